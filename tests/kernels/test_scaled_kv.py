"""8-bit keys and values: laws of the codes, attention by two paths, no copy, no lost NaN."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.kernels import attention as kernels
from mixtral_jax.kernels.attention import attention, blocked_attention
from mixtral_jax.kernels.scaled_kv import KV_DTYPES, KVDtype, ScaledKV, empty_kv, quantize_kv
from tests.kernels.routings import DTYPES
from tests.kernels.test_attention import check_blocks, operands

C = 8
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}  # and of the number: one bf16 step
FLUSHED = 2e-36  # 127 or 448 of the least normal f32: below, a scale may be flushed to 0
numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
vectors = st.lists(numbers, min_size=C, max_size=C)


def as_kv(vector: list[float]) -> jax.Array:
    return jnp.asarray(vector, jnp.float32).reshape(1, 1, 1, -1)


def restored(kv: ScaledKV) -> np.ndarray:
    return (
        np.asarray(kv.widened("float32"), np.float64) * np.asarray(kv.scales, np.float64)[..., None]
    )


def both(kv_dtype: KVDtype, k: jax.Array, v: jax.Array) -> tuple[ScaledKV, ScaledKV]:
    return quantize_kv(k, KV_DTYPES[kv_dtype]), quantize_kv(v, KV_DTYPES[kv_dtype])


@settings(max_examples=200)
@given(vector=vectors)
def test_int8_is_off_by_half_a_scale_at_most(vector):
    x = as_kv(vector)
    kv = quantize_kv(x, jnp.int8)
    error = np.abs(np.asarray(x, np.float64) - restored(kv))
    half = float(kv.scales[0, 0, 0]) / 2
    assert error.max() <= half * (1 + 1e-4) + FLUSHED
    if max(map(abs, vector)) > FLUSHED:
        assert np.abs(np.asarray(kv.codes)).max() == 127, "the range is used"


@settings(max_examples=200)
@given(vector=vectors)
def test_fp8_is_off_by_half_a_step_at_most(vector):
    """e4m3: 3 bits of mantissa, and steps of 2**-9 of the scale near zero."""
    x = as_kv(vector)
    kv = quantize_kv(x, KV_DTYPES["fp8"])
    error = np.abs(np.asarray(x, np.float64) - restored(kv))
    step = np.maximum(np.abs(np.asarray(x, np.float64)) / 16, float(kv.scales[0, 0, 0]) / 2**10)
    assert (error <= step * (1 + 1e-4) + FLUSHED).all()
    assert np.isfinite(kv.widened(jnp.float32)).all()


@settings(max_examples=50)
@given(vector=vectors)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_opposite_vector_has_opposite_codes(kv_dtype, vector):
    one, other = both(kv_dtype, as_kv(vector), -as_kv(vector))
    np.testing.assert_array_equal(restored(one), -restored(other))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_zeros_stay_zero_and_a_bad_vector_is_known_by_its_scale(kv_dtype, bad):
    x = jnp.stack([jnp.zeros(C), jnp.ones(C).at[3].set(bad), jnp.ones(C)])[None, :, None]
    kv = quantize_kv(x, KV_DTYPES[kv_dtype])
    assert restored(kv)[0, 0].tolist() == [[0.0] * C]
    assert np.isnan(restored(kv)[0, 1]).all()
    np.testing.assert_allclose(restored(kv)[0, 2], 1.0, rtol=1e-6)


def test_what_is_empty_is_what_will_be_written():
    for kv_dtype in KV_DTYPES.values():
        made = quantize_kv(jnp.zeros((2, 3, 4, 5)), kv_dtype)
        empty = empty_kv((2, 3, 4, 5), kv_dtype)
        assert isinstance(empty, ScaledKV)
        assert empty.shape == made.shape == (2, 3, 4, 5)
        for got, want in zip(empty, made, strict=True):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
            np.testing.assert_array_equal(np.asarray(got, float), np.asarray(want, float))
    assert isinstance(empty_kv((2, 3, 4, 5), jnp.bfloat16), jax.Array)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("T", "S", "window"), [(1, 300, None), (64, 1000, 50), (130, 256, None)])
def test_blocks_equal_all_keys_at_once(monkeypatch, T, S, window, kv_dtype, dtype):
    monkeypatch.setattr(kernels, "WIDENED_BYTES", 1)  # the least block, 128 keys
    q, k, v, queries, keys = operands(2, T, S, 4, 2, 16, dtype)
    inputs = (q, *both(kv_dtype, k, v), queries, keys)
    check_blocks(inputs, window, TOLERANCE[dtype])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_scales_outside_the_products_equal_restored_vectors(kv_dtype):
    """And the codes matter: the same attention over unquantized vectors differs."""
    q, k, v, queries, keys = operands(2, 5, 40, 4, 2, 16, "float32")
    codes = both(kv_dtype, k, v)
    whole_k, whole_v = (jnp.asarray(restored(kv), jnp.float32) for kv in codes)
    got = attention(q, *codes, queries, keys, window=None)
    want = attention(q, whole_k, whole_v, queries, keys, window=None)
    np.testing.assert_allclose(got, want, atol=TOLERANCE["float32"])
    plain = attention(q, k, v, queries, keys, window=None)
    assert 1e-3 < np.abs(plain - got).max() < 0.2


def test_float16_shares_keep_small_scales():
    """A value's scale of 2**-20 times a share would round to 0 in float16."""
    q, k, v, queries, keys = operands(2, 5, 40, 4, 2, 16, "float32")
    v = v * 2.0**-14
    want = attention(q, *both("int8", k, v), queries, keys, window=None)
    got = attention(q.astype("float16"), *both("int8", k, v), queries, keys, window=None)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=2.0**-22)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_bad_vector_reaches_its_row_alone(monkeypatch, kv_dtype, side, bad):
    monkeypatch.setattr(kernels, "WIDENED_BYTES", 1)
    q, k, v, queries, keys = operands(2, 1, 300, 4, 2, 16, "float32")
    seen = int(np.argmax(np.asarray(keys[1]) == int(queries[1, 0]) - 3))
    damaged = (k if side == "keys" else v).at[1, :, seen, 2].set(bad)
    k, v = (damaged, v) if side == "keys" else (k, damaged)
    for kernel in (attention, blocked_attention):
        out = np.asarray(kernel(q, *both(kv_dtype, k, v), queries, keys, window=None))
        assert np.isfinite(out[0]).all()
        assert np.isnan(out[1]).all()


def wide_arrays(
    kernel, kv_shape: tuple[int, int, int, int], kv_dtype: KVDtype, T: int
) -> list[str]:
    """Float arrays of the compiled program with as many elements as the keys."""
    B, K, S, channels = kv_shape
    kv = jax.eval_shape(lambda: empty_kv(kv_shape, KV_DTYPES[kv_dtype]))
    q = jax.ShapeDtypeStruct((B, T, 2 * K, channels), jnp.float32)
    places = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((B, T), (B, S))]
    lowered = jax.jit(kernel, static_argnames="window").lower(q, kv, kv, *places, window=None)
    text = lowered.compile().as_text()
    assert text
    found = re.findall(r"\b((?:f64|f32|f16|bf16)\[([\d,]+)\])", text)
    size = math.prod(kv_shape)
    return [shape for shape, dims in found if math.prod(map(int, dims.split(","))) >= size]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("T", [1, 16])
def test_codes_are_never_widened_whole(kv_dtype, T):
    """The reference path, the control, does it."""
    shape = (2, 2, 8192, 64)
    assert math.prod(shape) > kernels.WIDENED_BYTES, "four blocks of f32 or more"
    assert wide_arrays(blocked_attention, shape, kv_dtype, T) == []
    assert wide_arrays(attention, shape, kv_dtype, T)
