"""Likelihoods of continuations are sums over teacher-forced logits, in any order and batch."""

from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest

from mixtral_jax.config import PRESETS
from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.evaluate import harness
from mixtral_jax.evaluate.__main__ import passed_on
from mixtral_jax.evaluate.likelihood import likelihoods
from mixtral_jax.evaluate.windows import Window
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.sharding.mesh import MeshSpec
from tests.models import REFERENCE, random_model

CONFIG = dataclasses.replace(
    PRESETS["tiny"], num_hidden_layers=1, vocab_size=32, max_position_embeddings=64
)
SIZES = [(1, 1), (5, 2), (30, 20), (3, 14), (16, 1), (1, 40), (2, 2)]  # context, continuation


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    model = random_model(CONFIG)
    return LanguageModel(model, tokenizer=None, placement=REFERENCE, spec=MeshSpec())


@pytest.fixture(scope="module")
def cut(lm) -> list[Window]:
    draw = np.random.default_rng(0)
    found = [Window(0, a, draw.integers(3, 32, a + b).tolist()) for a, b in SIZES]
    ids = [5, 6, 7]
    for _ in range(4):  # one that the model would have written itself
        ids.append(int(lm.logits([ids])[0, -1].argmax()))
    return [*found, Window(0, 3, ids)]


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_sums_of_log_probabilities(lm, cut, batch):
    told: list[int] = []
    found, dropped = likelihoods(lm, cut, batch=batch, watch=told.append)
    assert dropped == 0
    assert sum(told) == len(cut)
    for window, likelihood in zip(cut, found, strict=True):
        logits = lm.logits([window.token_ids])[0].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        places = range(window.first, len(window.token_ids))
        wanted = sum(logprobs[i - 1, window.token_ids[i]] for i in places)
        assert likelihood.logprob == pytest.approx(wanted, abs=1e-4)
        best = all(logprobs[i - 1].argmax() == window.token_ids[i] for i in places)
        assert likelihood.is_greedy == best
    assert found[-1].is_greedy
    assert not found[2].is_greedy


def test_ids_outside_are_refused(lm):
    with pytest.raises(MixtralError, match="0 to 31, got 32") as caught:
        likelihoods(lm, [Window(0, 1, [1, 32])], batch=2)
    assert caught.value.code == BAD_DATA
    assert likelihoods(lm, [], batch=2) == ([], 0)


def test_without_lm_eval(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MixtralError, match=r"pip install 'lm-eval\[api\]") as caught:
        harness.register()
    assert caught.value.code == USAGE


def test_arguments_of_lm_eval_are_left_to_it():
    assert passed_on(["lm-eval", "--tasks", "a"]) == ["lm-eval", "--", "--tasks", "a"]
    assert passed_on(["lm-eval"]) == ["lm-eval"]
    assert passed_on(["routing", "--text", "a"]) == ["routing", "--text", "a"]
    assert passed_on([]) == []
