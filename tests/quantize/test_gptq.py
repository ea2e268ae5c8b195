"""GPTQ against the paper's algorithm written out in numpy, column by column."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.quantize.gptq import (
    add_hessian,
    find_grid,
    output_error,
    round_to_nearest,
    solve,
)


class Slow(NamedTuple):
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    order: np.ndarray


def slow_grid(w: np.ndarray, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero of one group, for each row."""
    most = 2**bits - 1
    low, high = np.minimum(0, w.min(axis=1)), np.maximum(0, w.max(axis=1))
    if symmetric:
        high = np.maximum(-low, high)
        low = -high
    low, high = np.where(low == high, -1, low), np.where(low == high, 1, high)
    scale = ((high - low) / most).astype(ml_dtypes.bfloat16).astype(float)
    zero = np.full_like(scale, 2 ** (bits - 1)) if symmetric else np.round(-low / scale)
    return scale, zero


def slow_gptq(w, hessian, bits, group, symmetric, act_order, damp) -> Slow:
    """Every column corrects all that follow it at once; the inverse is taken explicitly."""
    w, hessian = w.copy(), hessian.copy()
    outputs, inputs = w.shape
    seen = np.diag(hessian).copy()
    for j in np.flatnonzero(seen == 0):
        w[:, j], hessian[j, j] = 0, 1
    order = np.arange(inputs)
    if act_order:
        order = np.argsort(-seen, kind="stable")
        w, hessian = w[:, order], hessian[np.ix_(order, order)]
    hessian = hessian + damp * np.mean(np.diag(hessian)) * np.eye(inputs)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    size = group or inputs
    codes = np.zeros((outputs, inputs), int)
    scales, zeros = np.zeros((outputs, inputs // size)), np.zeros((outputs, inputs // size))
    for j in range(inputs):
        g = j // size
        if j % size == 0:
            scales[:, g], zeros[:, g] = slow_grid(w[:, j : j + size], bits, symmetric)
        code = np.clip(np.round(w[:, j] / scales[:, g]) + zeros[:, g], 0, 2**bits - 1)
        codes[:, j] = code
        error = (w[:, j] - (code - zeros[:, g]) * scales[:, g]) / factor[j, j]
        w[:, j:] -= np.outer(error, factor[j, j:])
    return Slow(codes, scales, zeros, order)


def drawn(seed: int, outputs: int = 24, inputs: int = 128, rows: int = 500):
    """Weights, and inputs that are correlated and of unequal size, one of them dead."""
    draw = np.random.default_rng(seed)
    mix = draw.normal(size=(inputs, inputs)) / np.sqrt(inputs)
    x = draw.normal(size=(rows, inputs)) @ (mix + 0.5 * np.eye(inputs))
    x *= np.exp(0.4 * draw.normal(size=inputs))
    x[:, 5] = 0
    return draw.normal(size=(outputs, inputs)), x


def dequantized(made, group: int | None, inputs: int) -> np.ndarray:
    size = group or inputs
    codes = np.asarray(made.codes, np.float64)
    scales, zeros = (np.repeat(np.asarray(a, np.float64), size, 1) for a in made[1:3])
    values = (codes - zeros) * scales
    out = np.empty_like(values)
    out[:, np.asarray(made.order)] = values
    return out


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "act_order"),
    [
        (2, 32, False, True),
        (2, None, True, False),
        (3, 64, True, True),
        (3, 32, False, False),
        (4, 64, True, False),
        (4, None, False, True),
        (4, 32, True, True),
        (8, 32, True, True),
        (8, 128, False, False),
    ],
)
def test_code_for_code_as_the_paper(bits, group, symmetric, act_order):
    w, x = drawn(bits)
    hessian = 2 * x.T @ x
    want = slow_gptq(w, hessian, bits, group, symmetric, act_order, 0.01)
    with jax.enable_x64():
        got = solve(
            jnp.asarray(w),
            jnp.asarray(hessian),
            bits=bits,
            group=group,
            symmetric=symmetric,
            act_order=act_order,
            damp=jnp.asarray(0.01),
            scale_dtype="bfloat16",
        )
    np.testing.assert_array_equal(got.codes, want.codes)
    np.testing.assert_array_equal(got.zeros, want.zeros)
    np.testing.assert_array_equal(got.order, want.order)
    np.testing.assert_allclose(got.scales, want.scales, rtol=1e-9)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outputs_are_nearer_than_rounded_to_nearest(bits, act_order):
    """In f32, on rows that calibration did not see, with scales as they are stored."""
    w, x = drawn(7, rows=2000)
    seen, unseen = x[:1000].astype(np.float32), x[1000:]
    hessian = add_hessian(jnp.zeros((128, 128)), jnp.asarray(seen), jnp.ones(1000))
    np.testing.assert_allclose(hessian, 2 * seen.T @ seen, rtol=1e-4, atol=1e-2)
    w32 = jnp.asarray(w, jnp.float32)
    how = {"bits": bits, "group": 32, "symmetric": False, "scale_dtype": "bfloat16"}
    made = solve(w32, hessian, act_order=act_order, damp=jnp.float32(0.01), **how)
    rtn = np.asarray(round_to_nearest(w32, **how), np.float64)
    ours = np.linalg.norm((w - dequantized(made, 32, 128)) @ unseen.T)
    theirs = np.linalg.norm((w - rtn) @ unseen.T)
    assert ours < (0.95 if bits == 2 else 0.85) * theirs
    told = float(output_error(w32 - rtn.astype(np.float32), hessian))
    assert told == pytest.approx(np.linalg.norm((w - rtn) @ seen.T) ** 2, rel=1e-3)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    """With a diagonal Hessian GPTQ is round to nearest."""
    w, _ = drawn(3)
    w32 = jnp.asarray(w, jnp.float32)
    how = {"bits": 3, "group": 32, "symmetric": True, "scale_dtype": "bfloat16"}
    made = solve(w32, jnp.eye(128), act_order=False, damp=jnp.float32(0), **how)
    np.testing.assert_allclose(dequantized(made, 32, 128), round_to_nearest(w32, **how), atol=1e-6)


def test_rows_of_weight_zero_do_not_count():
    _, x = drawn(4)
    rows = jnp.asarray(x[:10], jnp.float32)
    some = jnp.arange(10) < 6
    got = add_hessian(jnp.zeros((128, 128)), rows, some.astype(jnp.float32))
    np.testing.assert_allclose(got, 2 * x[:6].T @ x[:6], rtol=1e-4, atol=1e-3)


def test_a_hessian_that_is_not_positive_gives_nan_scales():
    w, _ = drawn(5)
    how = {"bits": 4, "group": 32, "symmetric": True, "act_order": False}
    made = solve(jnp.asarray(w, jnp.float32), -jnp.eye(128), damp=jnp.float32(0.01), **how)
    assert np.isnan(np.asarray(made.scales)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_of_zeros_and_of_tiny_values_stay_finite(symmetric):
    w = jnp.zeros((2, 1, 8)).at[1, 0, 3].set(1e-45)
    for dtype in (None, "bfloat16", "float16"):
        grid = find_grid(w, bits=4, symmetric=symmetric, scale_dtype=dtype)
        assert np.isfinite(np.asarray(grid.scales)).all()
        assert (np.asarray(grid.scales) > 0).all()
