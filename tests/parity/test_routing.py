"""The routing report counts what transformers' router logits say, token by token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.evaluate.study import study
from mixtral_jax.evaluate.text import TextFile
from mixtral_jax.evaluate.token_classes import CLASSES, token_classes
from mixtral_jax.evaluate.windows import Windowing
from mixtral_jax.language_model import EMBEDDED_FOLDER, LanguageModel

pytestmark = pytest.mark.parity

PLAIN = "12 + 30 = 42. 5 - 3 = 2.\nMonday, Tuesday, Wednesday, Thursday\nLa capitale est Paris.\n"
TALKS = [("What is 12 + 30?", "42"), ("Zähle von 3 bis 9.", "3, 4, 5, 6, 7, 8, 9")]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return mj.load("tiny", mesh="1x8")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> list[TextFile]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "plain.txt").write_text(PLAIN)
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in TALKS
    ]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [TextFile(folder / name) for name in ("plain.txt", "talks.jsonl")]


def documents(lm: LanguageModel) -> list[list[list[int]]]:
    """Of both texts, each with <s> first and, of a conversation, </s> last."""
    assert lm.tokenizer is not None
    talks = []
    for question, answer in TALKS:
        ids = lm.encode_chat([{"role": "user", "content": question}])
        talks.append([*ids, *lm.tokenizer.encode(answer, bos=False), lm.tokenizer.eos_id])
    return [[lm.encode(PLAIN)], talks]


def published(torch: Any, model: Any, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Experts [L, T - 1, A] and their weights, all tokens but the last."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
    best = [each.float().softmax(-1).topk(2) for each in logits]
    experts = np.stack([each.indices.numpy() for each in best])[:, :-1]
    weights = np.stack([each.values.numpy() for each in best])[:, :-1]
    return experts, weights / weights.sum(axis=-1, keepdims=True)


def test_counts(torch, transformers, lm, texts):
    model = transformers.MixtralForCausalLM.from_pretrained(
        EMBEDDED_FOLDER, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert lm.tokenizer is not None
    found = study([lm], texts, tokenizer=lm.tokenizer, windowing=Windowing(context=256), keep=10**6)
    L, E = found.total.counts.shape
    classes = token_classes(lm.tokenizer)
    loads = []
    for text, ids_of_text in zip(found.texts, documents(lm), strict=True):
        by_choice, by_class = np.zeros((L, 2, E), int), np.zeros((L, len(CLASSES), E), int)
        first, shared, at = np.zeros(L, int), np.zeros(L, int), 0
        for ids in ids_of_text:
            experts, weights = published(torch, model, ids)
            tokens = slice(at, at := at + len(ids) - 1)
            assert text.kept is not None
            assert text.kept.token_ids[tokens].tolist() == ids[:-1]
            np.testing.assert_array_equal(text.kept.expert_ids[:, tokens], experts)
            np.testing.assert_allclose(text.kept.weights[:, tokens], weights, atol=1e-4)
            for layer in range(L):
                for token_id, (one, two) in zip(ids, experts[layer], strict=False):
                    by_choice[layer, [0, 1], [one, two]] += 1
                    by_class[layer, classes[token_id], [one, two]] += 1
                for before, after in zip(experts[layer], experts[layer, 1:], strict=False):
                    first[layer] += before[0] == after[0]
                    shared[layer] += bool({*before} & {*after})
        assert (text.counts.by_choice == by_choice).all()
        assert (text.counts.by_class == by_class).all()
        assert (text.counts.same_first == first).all()
        assert (text.counts.same_any == shared).all()
        assert text.counts.tokens == at
        loads.append(by_choice.sum(axis=1) / by_choice.sum(axis=(1, 2))[:, None])
    p, q = loads
    kl = [(each * np.log2(np.where(each > 0, each / ((p + q) / 2), 1))).sum(-1) for each in loads]
    assert found.divergence is not None
    np.testing.assert_allclose(found.divergence, np.mean(kl, axis=0), atol=1e-12)
    assert (by_choice[:, 0] != by_choice[:, 1]).any(), "the order of choices matters"


def test_a_model_agrees_with_itself_on_another_mesh(lm, texts):
    assert lm.tokenizer is not None
    other = mj.load("tiny", mesh="1x1")
    sizes = Windowing(context=256)
    found = study([lm, other], texts, tokenizer=lm.tokenizer, windowing=sizes).agreement
    assert found is not None
    assert (found.same_first == 1).all()
    assert (found.same_set == 1).all()
    coarse = mj.load("tiny", mesh="1x1", quantize="int4")
    rounded = study([lm, coarse], texts, tokenizer=lm.tokenizer, windowing=sizes).agreement
    assert rounded is not None
    assert rounded.same_set.min() < 1
