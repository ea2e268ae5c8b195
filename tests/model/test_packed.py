"""Texts packed in one row: each is read as if it were alone; remat changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.placement import LocalPlacement
from mixtral_jax.model.transformer import Mixtral, with_window
from tests.models import random_model
from tests.slow import mostly_slow

LENGTHS = (5, 1, 9, 3)
T = 24

hidden_of = jax.jit(Mixtral.hidden, static_argnames=("placement", "remat"))


def packed(rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    texts = [rng.integers(3, 64, n).astype(np.int32) for n in LENGTHS]
    tokens, segments = np.zeros((1, T), np.int32), np.zeros((1, T), np.int32)
    at = 0
    for number, text in enumerate(texts, start=1):
        tokens[0, at : at + len(text)] = text
        segments[0, at : at + len(text)] = number
        at += len(text)
    return texts, tokens, segments


KERNELS = ["visit", "visit 4", "reference", "reference 4", "gpu", "gpu 4", "tpu", "tpu 4"]


@pytest.mark.parametrize("case", mostly_slow(KERNELS, ["visit 4"]))
def test_a_packed_text_is_read_as_if_it_were_alone(small_config, case):
    kernels, _, tokens_seen = case.partition(" ")
    window = int(tokens_seen) if tokens_seen else None
    config = small_config(num_local_experts=4, sliding_window=window)
    model, placement = random_model(with_window(config, T)), LocalPlacement(kernels)
    texts, tokens, segments = packed(np.random.default_rng(0))
    tokens, segments = jnp.asarray(tokens), jnp.asarray(segments)
    hidden = hidden_of(model, tokens, segments > 0, segments=segments, placement=placement)
    alone = random_model(config)
    at = 0
    for text in texts:
        want = hidden_of(alone, jnp.asarray(text[None]), placement=placement).x[0]
        assert np.isfinite(want).all()
        np.testing.assert_allclose(hidden.x[0, at : at + len(text)], want, atol=1e-5)
        at += len(text)
    mixed = hidden_of(model, tokens, segments > 0, placement=placement).x
    assert np.abs(mixed - hidden.x)[0, 6:18].max() > 1e-2, "without segments texts see each other"


@pytest.mark.slow
def test_blocks_of_keys_keep_texts_apart_too(small_config, monkeypatch):
    monkeypatch.setattr("mixtral_jax.kernels.attention.SCORE_BYTES", 1)
    config = with_window(small_config(num_hidden_layers=1), 512)
    model = random_model(config)
    rng = np.random.default_rng(1)
    tokens = jnp.asarray(rng.integers(3, 64, (2, 512)), jnp.int32)
    segments = jnp.sort(jnp.asarray(rng.integers(1, 6, (2, 512)), jnp.int32), axis=1)
    blocked = hidden_of(model, tokens, segments=segments, placement=LocalPlacement("visit")).x
    plain = hidden_of(model, tokens, segments=segments, placement=LocalPlacement("reference")).x
    np.testing.assert_allclose(blocked, plain, atol=1e-4)


def test_remat_changes_no_gradient(small_config):
    model = random_model(small_config(num_local_experts=4))
    tokens = jnp.asarray(np.random.default_rng(2).integers(3, 64, (2, 8)), jnp.int32)

    def gradient(remat: bool):
        def loss(model: Mixtral) -> jax.Array:
            return jnp.square(model.hidden(tokens, remat=remat).x).sum()

        return jax.jit(jax.grad(loss))(model)

    for got, want in zip(*(jax.tree.leaves(gradient(r)) for r in (True, False)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
