"""Blocks of keys equal all keys at once; what nobody sees costs nothing and changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.kernels import attention as kernels
from mixtral_jax.kernels.attention import EMPTY, attends, attention, blocked_attention
from tests.kernels.routings import DTYPES

TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}


@settings(max_examples=30)
@given(query=st.integers(0, 40), key=st.integers(-1, 40), window=st.none() | st.integers(1, 20))
def test_mask_follows_its_definition(query, key, window):
    mask = attends(jnp.asarray([[query]]), jnp.asarray([[key]]), window)
    sees = 0 <= key <= query and (window is None or query - key < window)
    assert bool(mask[0, 0, 0]) == (sees and key != EMPTY)


def operands(B: int, T: int, S: int, H: int, K: int, C: int, dtype: str):
    """Keys in a ring that has wrapped, its end still empty in the first row."""
    keys = iter(jax.random.split(jax.random.key(S + T), 3))
    q = jax.random.normal(next(keys), (B, T, H, C)).astype(dtype)
    k = jax.random.normal(next(keys), (B, K, S, C)).astype(dtype)
    v = jax.random.normal(next(keys), (B, K, S, C)).astype(dtype)
    at = np.stack([np.roll(np.arange(S) + 7, 11) for _ in range(B)]).astype(np.int32)
    at[0, S // 2 :] = EMPTY
    queries = np.stack([at[b].max() - T + 1 + np.arange(T) for b in range(B)]).astype(np.int32)
    return q, k, v, jnp.asarray(queries), jnp.asarray(at)


def check_blocks(inputs, window: int | None, tolerance: float) -> None:
    """Both paths agree where a query sees a key; elsewhere any finite value will do."""
    got = blocked_attention(*inputs, window=window)
    want = attention(*inputs, window=window)
    assert got.dtype == want.dtype == inputs[0].dtype
    got, want = (np.asarray(x, np.float32) for x in (got, want))
    assert np.isfinite(got).all()
    *_, queries, keys = inputs
    sees = np.asarray(attends(queries, keys, window).any(axis=-1))
    np.testing.assert_allclose(got[sees], want[sees], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("T", "S"), [(1, 300), (5, 256), (64, 1000), (200, 520)])
def test_blocks_equal_all_keys_at_once(monkeypatch, T, S, window, dtype):
    monkeypatch.setattr(kernels, "SCORE_BYTES", 1)  # the least block, 128 keys
    inputs = operands(2, T, S, 4, 2, 16, dtype)
    check_blocks(inputs, window, TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", [attention, blocked_attention])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cache_of_16_bits_may_be_held_in_f32(kernel, dtype):
    q, k, v, *places = operands(2, 3, 300, 4, 2, 16, dtype)
    wide = (q, k.astype("float32"), v.astype("float32"), *places)
    got, want = kernel(*wide, window=None), kernel(q, k, v, *places, window=None)
    assert got.dtype == want.dtype == jnp.dtype(dtype)
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, atol=1e-2)


def test_scores_are_never_held_whole():
    """Of 32,768 keys a block at a time; the plain path, the control, holds all of them."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 512, 8, 64), (1, 2, 32768, 64))]
    places = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, 512), (1, 32768))]

    def temporaries(kernel) -> int:
        lowered = jax.jit(kernel, static_argnames="window").lower(
            shapes[0], shapes[1], shapes[1], *places, window=None
        )
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    scores = 8 * 512 * 32768 * 4
    assert temporaries(blocked_attention) < 6 * kernels.SCORE_BYTES
    assert temporaries(attention) >= scores

    def gradient(*operands, window):
        return jax.grad(lambda *o: blocked_attention(*o, window=window).sum())(*operands)

    assert temporaries(gradient) < scores  # kept: what has run so far, after every block


def test_gradients_of_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "SCORE_BYTES", 1)
    q, k, v, queries, at = operands(2, 16, 300, 4, 2, 16, "float32")

    def loss(kernel):
        return lambda q, k, v: (kernel(q, k, v, queries, at, window=None) ** 2).sum()

    got = jax.grad(loss(blocked_attention), (0, 1, 2))(q, k, v)
    want = jax.grad(loss(attention), (0, 1, 2))(q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
