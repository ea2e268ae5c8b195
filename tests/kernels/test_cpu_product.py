"""Every order of operands gives the reference's product; digits lose nothing that f32 keeps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.contract import rows_first
from mixtral_jax.kernels.cpu_product import (
    MAX_DIGIT_ROWS,
    cpu_product,
    int8_product,
    split_digits,
)
from mixtral_jax.weights import QTensor

O, I = 48, 136  # noqa: E741


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def int8(w: np.ndarray, dtype: str = "float32") -> QTensor:
    scales = np.abs(w).max(axis=-1, keepdims=True) / 127
    codes = np.round(w / scales).astype(np.int8)
    return QTensor(jnp.asarray(codes), jnp.asarray(scales), "int8", jnp.dtype(dtype))


def exact(x: np.ndarray, w: QTensor) -> np.ndarray:
    weight = np.asarray(w.codes, np.float64) * np.asarray(w.scales, np.float64)
    return np.asarray(x, np.float64) @ weight.T


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 33])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-6)])
def test_arrays_as_the_reference(rows: int, dtype: str, tolerance: float):
    x, w = jnp.asarray(numbers(0, rows, I), dtype), jnp.asarray(numbers(1, O, I), dtype)
    got, want = jax.jit(cpu_product)(x, w), rows_first(x, w)
    assert got.dtype == jnp.float32
    assert got.shape == (rows, O)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def test_digits_keep_what_f32_keeps_of_the_largest():
    x = numbers(2, 5, I) * np.array([[1e-30], [1e-3], [1], [1e4], [1e30]], np.float32)
    digits, unit = split_digits(jnp.asarray(x), 3)
    parts = np.asarray(digits, np.float64)
    back = (parts / 254.0 ** np.arange(3)[:, None, None]).sum(0) * np.asarray(unit, np.float64)
    worst = np.abs(back - x).max(axis=1) / np.abs(x).max(axis=1)
    assert worst.max() < 2e-7  # two units in the last place of f32
    assert np.asarray(digits).min() >= -127


@pytest.mark.parametrize("rows", [1, 2, MAX_DIGIT_ROWS // 3, MAX_DIGIT_ROWS])
def test_int8_is_exact_to_f32_even_beside_an_outlier(rows: int):
    x, w = numbers(3, rows, I), int8(numbers(4, O, I))
    x[:, 5] *= 1000  # as in the massive activations of trained models
    want = exact(x, w)
    got = jax.jit(cpu_product)(jnp.asarray(x), w)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_bf16_rows_are_no_further_than_dequantized_weights():
    x, w = numbers(5, 2, I), int8(numbers(6, O, I), "bfloat16")
    x = jnp.asarray(x, jnp.bfloat16)
    want = exact(np.asarray(x, np.float32), w)
    ours, plain = (np.abs(np.asarray(f(x, w)) - want).max() for f in (int8_product, rows_first))
    assert ours < plain / 10  # rounding the weights to bf16 is what is saved


def test_two_digits_lose_less_than_bf16_whatever_the_row():
    x = numbers(12, 3, 4096) * 1e-3
    x[1, 7], x[2] = 1.0037, 0.0  # a row that is nearly one number
    x[2, :9] = 3.3
    x[0] = numbers(13, 4096)
    rounded = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
    digits, unit = split_digits(jnp.asarray(rounded), 2)
    back = (np.asarray(digits, np.float64) / [[[1]], [[254]]]).sum(0) * np.asarray(unit)
    lost, had_lost = (np.sqrt(((a - b) ** 2).mean(1)) for a, b in ((back, rounded), (rounded, x)))
    assert (lost <= had_lost + 1e-12).all(), (lost, had_lost)
    assert lost[0] > 0


def test_zero_rows_and_rows_that_are_not_finite():
    x = numbers(7, 4, I)
    x[0], x[1, 3], x[2, 9] = 0, np.nan, np.inf
    got = np.asarray(jax.jit(cpu_product)(jnp.asarray(x), int8(numbers(8, O, I))))
    assert (got[0] == 0).all()
    assert np.isnan(got[1:3]).all()
    assert np.isfinite(got[3]).all()


def test_a_row_whose_sum_overflows_is_no_row_of_nan():
    x = np.full((1, I), 3e37, np.float32)  # their sum is beyond f32
    w = int8(numbers(14, O, I) * np.float32(1e-3))
    got = np.asarray(jax.jit(cpu_product)(jnp.asarray(x), w))
    want = exact(x, w)
    np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())


def test_gradients_pass_through_the_rounding():
    x, w, g = jnp.asarray(numbers(9, 2, I)), int8(numbers(10, O, I)), numbers(11, 2, O)
    got = jax.grad(lambda x: (int8_product(x, w) * g).sum())(x)
    np.testing.assert_allclose(got, g @ np.asarray(w.dequantize()), atol=1e-4)
    assert np.abs(got).max() > 1
