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
    digits_of,
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("outlier", [1.0, 0.75, 30.0, 1000.0])
def test_digits_lose_no_more_than_their_bound_says(dtype: str, outlier: float):
    x = numbers(12, 3, 4096)
    x[:, 7] = outlier  # exact in 16 bits: what is lost is the digits' own
    x = np.asarray(jnp.asarray(x, dtype), np.float32)
    num_digits = digits_of(jnp.dtype(dtype))
    digits, unit = split_digits(jnp.asarray(x), num_digits)
    powers = 254.0 ** np.arange(num_digits)[:, None, None]
    back = (np.asarray(digits, np.float64) / powers).sum(0) * np.asarray(unit, np.float64)
    bound = {2: 1.6e-5, 3: 1.3e-7}[num_digits]  # of f32 arithmetic, with three
    lost = np.abs(back - x).max(axis=1)
    assert (lost <= bound * np.abs(x).max(axis=1)).all()
    assert lost.max() > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_row_is_the_same_however_many_there_are(dtype: str):
    """Few rows go in digits, many as they are: neither may round the weights to 16 bits."""
    x, w = jnp.asarray(numbers(15, 40, I), dtype), int8(numbers(16, O, I), dtype)
    run = jax.jit(cpu_product)
    want = np.asarray(run(x, w))
    for rows in (1, 2, MAX_DIGIT_ROWS // 3, MAX_DIGIT_ROWS // 2, MAX_DIGIT_ROWS // 2 + 1):
        got = np.asarray(run(x[:rows], w))
        np.testing.assert_allclose(got, want[:rows], atol=5e-5 * np.abs(want).max())


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
