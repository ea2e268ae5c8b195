"""Perplexity is what numpy makes of the same windows, on any mesh and in any batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import mixtral_jax as mj
from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.evaluate.perplexity import compare, perplexity
from mixtral_jax.evaluate.routing import expert_load
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.language_model import LanguageModel
from tests.reference import mixtral as reference
from tests.slow import mostly_slow

RELATIVE = 2e-6  # of a mean of f32 log-probabilities, beside f64
CONFIG = reference.small_config(max_position_embeddings=64)
SIZES = [(64, 32), (16, 16), (16, 1), (17, 5), (2, 1), (2, 2)]
NUM_TOKENS = 45


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    return reference.random_weights(CONFIG, seed)


def publish(folder: Path, tensors: dict[str, np.ndarray], **fields: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return publish(tmp_path_factory.mktemp("model") / "plain", weights())


@pytest.fixture(scope="module")
def lm(folder) -> LanguageModel:
    return mj.load(folder, mesh="1x1")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory) -> tuple[LanguageModel, dict[str, np.ndarray]]:
    """Another model, near enough to agree now and then."""
    draw = np.random.default_rng(5)
    tensors = {
        name: (w + 0.05 * draw.standard_normal(w.shape) * w.std()).astype(np.float32)
        for name, w in weights().items()
    }
    return mj.load(publish(tmp_path_factory.mktemp("model") / "noisy", tensors)), tensors


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(1).integers(0, CONFIG["vocab_size"], NUM_TOKENS).tolist()


def begin_of(token: int, context: int, stride: int) -> int:
    """Where the window that scores a token begins: the first of [kS, kS + C) that holds it."""
    k = max(0, -(-(token + 1 - context) // stride))
    return k * stride if k == 0 or stride < context else k * stride - 1


def judged(
    tensors: dict[str, np.ndarray], tokens: list[int], context: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """f64 log-probabilities [n - 1, V] of the tokens behind the first, each from a pass of its own.

    And the experts chosen there, as sets, [n - 1, L, A].
    """
    exact = {name: w.astype(np.float64) for name, w in tensors.items()}
    logs, chosen = [], []
    for token in range(1, len(tokens)):
        before = np.array([tokens[begin_of(token, context, stride) : token]])
        found = reference.forward(exact, CONFIG, before)
        last = found.logits[0, -1]
        logs.append(last - last.max() - np.log(np.exp(last - last.max()).sum()))
        chosen.append([np.sort(layer.expert_ids[-1]) for layer in found.routing])
    return np.array(logs), np.array(chosen)


@pytest.mark.parametrize(("context", "stride"), SIZES)
def test_equals_numpy(lm, tokens, context, stride):
    logs, _ = judged(weights(), tokens, context, stride)
    nll = -logs[np.arange(len(logs)), tokens[1:]].mean()
    found = perplexity(lm, iter(tokens), windowing=Windowing(context=context, stride=stride))
    assert found.nll == pytest.approx(nll, rel=RELATIVE)
    assert found.perplexity == pytest.approx(np.exp(nll), rel=10 * RELATIVE)
    assert (found.tokens, found.scored) == (NUM_TOKENS, NUM_TOKENS - 1)
    assert (found.context, found.stride, found.dropped) == (context, stride, 0)


def test_a_stride_off_by_one_would_be_noticed(lm, tokens):
    found = [
        perplexity(lm, tokens, windowing=Windowing(context=16, stride=stride)).nll
        for stride in (7, 8)
    ]
    assert abs(found[0] - found[1]) > 100 * RELATIVE * found[0]


@pytest.mark.parametrize("num_tokens", [2, 3, 16, 17, 18, 33])
def test_odd_ends(lm, tokens, num_tokens):
    logs, _ = judged(weights(), tokens[:num_tokens], 16, 16)
    nll = -logs[np.arange(len(logs)), tokens[1:num_tokens]].mean()
    windowing = Windowing(context=16, stride=16)
    found = perplexity(lm, tokens[:num_tokens], windowing=windowing, batch=2)
    assert found.nll == pytest.approx(nll, rel=RELATIVE)


@pytest.mark.parametrize("mesh", mostly_slow(["1x1", "1x8", "2x2x2"], ["1x8"]))
@pytest.mark.parametrize("batch", mostly_slow([1, 3, 64], [3]))
def test_neither_batch_nor_mesh_matters(folder, lm, tokens, mesh, batch):
    windowing = Windowing(context=16, stride=5)
    wanted = perplexity(lm, tokens, windowing=windowing)
    found = perplexity(mj.load(folder, mesh=mesh), tokens, windowing=windowing, batch=batch)
    assert found.nll == pytest.approx(wanted.nll, rel=RELATIVE)
    assert found.windows == wanted.windows


def test_logits_in_parts_are_those_of_the_whole(lm, tokens, monkeypatch):
    """The negative control of the parts: three of them, and the last one is padding in part."""
    from mixtral_jax.evaluate import scores

    windowing = Windowing(context=44, stride=3)
    wanted = perplexity(lm, tokens, windowing=windowing)
    monkeypatch.setattr(scores, "ROWS_OF_LOGITS", 32)
    assert scores.length_bucket(43, 2) == 48
    found = perplexity(lm, tokens, windowing=windowing)
    assert found.nll == pytest.approx(wanted.nll, rel=1e-7)


def test_nothing_lies_between_a_model_and_itself(lm, tokens):
    found = compare(lm, lm, tokens, windowing=Windowing(context=16, stride=8))
    assert found.first == found.other
    assert found.divergence.kl == 0.0
    assert found.divergence.top1_agreement == found.divergence.routing_agreement == 1.0


def test_divergence_equals_numpy(lm, noisy, tokens):
    other, tensors = noisy
    ours, our_experts = judged(weights(), tokens, 16, 8)
    theirs, their_experts = judged(tensors, tokens, 16, 8)
    found = compare(lm, other, tokens, windowing=Windowing(context=16, stride=8), batch=3)
    kl = (np.exp(ours) * (ours - theirs)).sum(axis=-1).mean()
    same = (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).mean()
    routed = (our_experts == their_experts).all(axis=-1).mean()
    assert 0 < same < 1
    assert 0 < routed < 1
    assert kl > 1e-3
    assert found.divergence.kl == pytest.approx(kl, rel=1e-4)
    assert found.divergence.top1_agreement == pytest.approx(same)
    assert found.divergence.routing_agreement == pytest.approx(routed)
    windowing = Windowing(context=16, stride=8)
    alone = perplexity(other, tokens, windowing=windowing)
    assert found.other.nll == pytest.approx(alone.nll, rel=RELATIVE)
    assert found.first.nll != found.other.nll


def test_models_of_other_experts_have_no_routing_agreement(lm, tokens, tmp_path):
    fields = {"num_local_experts": 4}
    tensors = reference.random_weights(CONFIG | fields, 2)
    other = mj.load(publish(tmp_path / "four", tensors, **fields), mesh="1x4")
    found = compare(lm, other, tokens, windowing=Windowing(context=16))
    assert found.divergence.routing_agreement is None
    assert found.divergence.kl > 0.1


def test_loads(lm, tokens):
    _, experts = judged(weights(), tokens, 16, 8)
    found = expert_load(lm, tokens, windowing=Windowing(context=16, stride=8), batch=3)
    wanted = [np.bincount(experts[:, layer].reshape(-1), minlength=8) for layer in range(2)]
    assert found.counts.tolist() == [row.tolist() for row in wanted]
    assert found.tokens == NUM_TOKENS - 1
    shares = found.shares[0][found.shares[0] > 0]
    assert found.entropy[0] == pytest.approx(-(shares * np.log(shares)).sum() / np.log(8))


def refusal(code: int, call: Any) -> str:
    with pytest.raises(MixtralError) as caught:
        call()
    assert caught.value.code == code
    return str(caught.value)


def test_refusals(lm, tokens, tmp_path):
    assert "at least 2 tokens" in refusal(BAD_DATA, lambda: perplexity(lm, [1]))
    assert "at least 2 tokens" in refusal(BAD_DATA, lambda: perplexity(lm, []))
    assert "0 to 63, got 64" in refusal(BAD_DATA, lambda: perplexity(lm, [1, 64]))
    assert "0 to 63, got -1" in refusal(BAD_DATA, lambda: perplexity(lm, [1, -1]))
    assert "--batch" in refusal(USAGE, lambda: perplexity(lm, tokens, batch=0))
    long = Windowing(context=65)
    assert "at most 64" in refusal(USAGE, lambda: perplexity(lm, tokens, windowing=long))


def test_nan_is_told_with_its_place(tokens, tmp_path):
    tensors = weights()
    token = next(t for t in tokens if tokens.index(t) > 4)
    tensors["model.embed_tokens.weight"][token] = np.nan
    broken = mj.load(publish(tmp_path / "broken", tensors))
    windowing = Windowing(context=4, stride=4)  # tokens [3, 8) are the first to hold it
    assert 3 < tokens.index(token) < 7
    line = refusal(BAD_DATA, lambda: perplexity(broken, tokens, windowing=windowing))
    assert "logits are NaN in the window that begins at token 3; fix: " in line


def test_a_perplexity_beyond_all_numbers_is_told(tokens, tmp_path):
    tensors = weights()
    tensors["lm_head.weight"] *= 1e4
    wild = mj.load(publish(tmp_path / "wild", tensors))
    line = refusal(BAD_DATA, lambda: perplexity(wild, tokens))
    assert "perplexity is infinite, exp(" in line


def test_other_vocabularies_are_refused(lm, tokens, tmp_path):
    fields = {"vocab_size": 66}
    tensors = reference.random_weights(CONFIG | fields, 2)
    other = mj.load(publish(tmp_path / "larger", tensors, **fields))
    assert "expected 64 token ids" in refusal(BAD_DATA, lambda: compare(lm, other, tokens))
