"""Perplexity is that of the loop in transformers' documentation, run by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.evaluate.perplexity import compare, perplexity
from mixtral_jax.evaluate.windows import Windowing
from tests.parity.test_transformers import build

pytestmark = pytest.mark.parity

RELATIVE = 1e-5  # of the mean of f32 log-probabilities
NUM_TOKENS = 150
SIZES = [(64, 32), (64, 63), (33, 7), (256, 128)]


def publish(torch: Any, transformers: Any, folder: Path, **fields: Any) -> Any:
    model = build(torch, transformers, fields)
    model.save_pretrained(folder)
    return model


def documented(torch: Any, model: Any, tokens: list[int], context: int, stride: int) -> float:
    """Mean loss per token by the sliding windows of "Perplexity of fixed-length models".

    Losses are summed and counted exactly, where the example takes the mean of each window times one
    token too few.
    """
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + context, len(tokens))
        input_ids = torch.tensor([tokens[begin:end]])
        target_ids = input_ids.clone()
        target_ids[:, : -(end - previous)] = -100
        with torch.no_grad():
            loss = model(input_ids, labels=target_ids).loss
        scored = int((target_ids[:, 1:] != -100).sum())
        total, count, previous = total + float(loss) * scored, count + scored, end
        if end == len(tokens):
            break
    assert count == len(tokens) - 1
    return total / count


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(0).integers(3, 128, NUM_TOKENS).tolist()


@pytest.mark.parametrize(("context", "stride"), SIZES)
def test_perplexity(torch, transformers, tmp_path, tokens, context, stride):
    model = publish(torch, transformers, tmp_path)
    wanted = documented(torch, model, tokens, context, stride)
    lm = mj.load(tmp_path, mesh="1x8")
    found = perplexity(lm, tokens, windowing=Windowing(context=context, stride=stride))
    assert found.nll == pytest.approx(wanted, rel=RELATIVE)
    other = documented(torch, model, tokens, context, stride + 1 if stride + 1 < context else 31)
    assert context >= NUM_TOKENS or found.nll != pytest.approx(other, rel=RELATIVE)


def test_divergence(torch, transformers, tmp_path, tokens):
    """One window over all, against KL and argmax by torch."""
    first = publish(torch, transformers, tmp_path / "first")
    other = publish(torch, transformers, tmp_path / "other", rms_norm_eps=1e-2)
    with torch.no_grad():
        p, q = (m(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1) for m in (first, other))
    kl = float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))
    same = float((p.argmax(-1) == q.argmax(-1)).float().mean())
    ours, theirs = (mj.load(tmp_path / name, mesh="1x1") for name in ("first", "other"))
    found = compare(ours, theirs, tokens, windowing=Windowing(context=256)).divergence
    assert kl > 1e-5
    assert found.kl == pytest.approx(kl, rel=1e-2)
    assert found.top1_agreement == pytest.approx(same)
