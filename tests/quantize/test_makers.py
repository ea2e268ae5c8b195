"""Makers: every code is the nearest one, groups are their own, and refusals say what to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, USAGE, MixtralError
from mixtral_jax.qtensor import SCHEMES, Nested
from mixtral_jax.quantize.gptq import round_to_nearest, solve
from mixtral_jax.quantize.gptq_matrices import tensor_of
from mixtral_jax.quantize.gptq_recipe import SCALES, GptqRecipe
from mixtral_jax.quantize.makers import NEAREST, Recipe, nest, quantize

RECIPES = {
    "int8": Recipe(scheme="int8"),
    "fp8": Recipe(scheme="fp8"),
    **{f"int4 {g}": Recipe(scheme="int4", group_size=g) for g in (32, 64, 128)},
    "int4 asymmetric": Recipe(scheme="int4", symmetric=False),
    "nf4": Recipe(scheme="nf4"),
    "fp4": Recipe(scheme="fp4"),
    "nf4 nested": Recipe(scheme="nf4", double_quant=True),
    "fp4 nested": Recipe(scheme="fp4", double_quant=True),
}
# Relative Frobenius error of Gaussian matrices, measured; a coarser maker would exceed it.
ERRORS = {"int8": 0.01, "fp8": 0.028, "int4": 0.115, "nf4": 0.096, "fp4": 0.13}


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def dequantized(q) -> np.ndarray:
    return np.asarray(jax.tree.map(jax.numpy.asarray, q).dequantize())


@pytest.mark.parametrize("name", RECIPES)
def test_error_is_small_and_the_stack_is_matrix_by_matrix(name):
    w = gaussian(3, 40, 256)
    q = quantize(w, RECIPES[name])
    assert (q.shape, q.dtype) == (w.shape, np.float32)
    got = dequantized(q)
    assert np.linalg.norm(got - w) < ERRORS[q.scheme] * np.linalg.norm(w)
    for one, matrix in zip(got, w, strict=True):
        np.testing.assert_array_equal(dequantized(quantize(matrix, RECIPES[name])), one)


@pytest.mark.parametrize("name", [name for name in RECIPES if "nested" not in name])
def test_every_value_is_the_nearest_that_its_group_has(name):
    recipe, w = RECIPES[name], gaussian(8, 256)
    q = quantize(w, recipe)
    groups = q.scales.shape[-1]
    row = SCHEMES[recipe.scheme]
    got = dequantized(q).reshape(8, groups, -1)
    for o in range(8):
        for g in range(groups):
            if row.table is not None:
                codes = np.asarray(row.table, np.float32)
            elif recipe.scheme == "fp8":
                codes = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
                codes = codes.astype(np.float32)[np.isfinite(codes.astype(np.float32))]
            elif recipe.scheme == "int8":
                codes = np.arange(-127, 128, dtype=np.float32)
            else:
                zero = 8 if q.zeros is None else int(q.zeros[o, g])
                codes = np.arange(16, dtype=np.float32) - zero
            values = codes * np.float32(q.scales[o, g])
            x = w.reshape(8, groups, -1)[o, g]
            best = np.abs(values[:, None] - x).min(axis=0)
            np.testing.assert_allclose(np.abs(got[o, g] - x), best, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_zeros_stay_zeros(name):
    np.testing.assert_array_equal(
        dequantized(quantize(np.zeros((4, 128), np.float32), RECIPES[name])), 0
    )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [1e-36, 1e-37, 1e-40])
def test_rows_too_small_for_a_scale_are_nearly_zero_and_change_no_other(name, size):
    w = gaussian(4, 128)
    w[1] = 0
    w[1, 3] = size
    with np.errstate(all="raise", under="ignore"):
        got = dequantized(quantize(w, RECIPES[name]))
    # Nested scales are near the mean of all of them, whatever is under one.
    others = dequantized(quantize(np.delete(w, 1, axis=0), RECIPES[name]))
    bound = 0.1 if "nested" in name else 2 * size
    assert np.abs(got[1]).max() <= bound
    np.testing.assert_allclose(np.delete(got, 1, axis=0), others, atol=bound)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_halves_are_quantized_as_the_numbers_they_are(name, dtype):
    w = gaussian(4, 128).astype(dtype)
    one, other = quantize(w, RECIPES[name]), quantize(w.astype(np.float32), RECIPES[name])
    assert one.dtype == dtype
    for part, same in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(part, same)


def test_bits_are_those_that_were_asked():
    w = gaussian(4, 128, 256)
    bits = {name: 8 * quantize(w, recipe).nbytes / w.size for name, recipe in RECIPES.items()}
    assert bits == {
        "int8": 8 + 32 / 256,
        "fp8": 8 + 32 / 256,
        "int4 32": 4.5,
        "int4 64": 4.25,
        "int4 128": 4.125,
        "int4 asymmetric": 4.25 + 8 / 64,
        "nf4": 4.5,
        "fp4": 4.5,
        "nf4 nested": 4 + 8 / 64 + 32 / (64 * 256) + 32 / (128 * 256),
        "fp4 nested": 4 + 8 / 64 + 32 / (64 * 256) + 32 / (128 * 256),
    }


def test_nested_scales_are_close_and_their_last_block_may_be_short():
    scales = np.abs(gaussian(100, 7))
    nested = nest(scales)
    assert isinstance(nested, Nested)
    assert nested.absmax.shape == (3,)
    values = np.asarray(jax.tree.map(jax.numpy.asarray, nested).values())
    assert np.abs(values - scales).max() < 0.02 * scales.max()


@pytest.mark.parametrize(
    ("options", "code", "match"),
    [
        ({"scheme": "int5"}, USAGE, "expected int8, int4"),
        ({"scheme": "int4", "group_size": 48}, USAGE, "--group-size: expected 32, 64, 128"),
        ({"scheme": "nf4", "group_size": 64}, USAGE, "--group-size is not for nf4"),
        ({"scheme": "int8", "symmetric": False}, USAGE, "--asymmetric is not for int8"),
        ({"scheme": "int4", "double_quant": True}, USAGE, "--double-quant is not for int4"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, code, match):
    with pytest.raises(MixtralError, match=match) as refusal:
        Recipe(**options)
    assert refusal.value.code == code


@pytest.mark.parametrize(
    ("name", "inputs", "fix"),
    [
        ("int4 64", 96, "quantize SRC DST --scheme int4 --group-size 32"),
        ("nf4", 96, "choose int8"),
        ("int4 64", 100, "int8"),
    ],
)
def test_rows_of_no_whole_groups_are_refused(name, inputs, fix):
    with pytest.raises(MixtralError, match=fix) as refusal:
        quantize(gaussian(4, inputs), RECIPES[name])
    assert refusal.value.code == BAD_CONFIG


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_refused(name, bad):
    w = gaussian(4, 128)
    w[2, 3] = bad
    with pytest.raises(MixtralError, match="cannot be quantized") as refusal:
        quantize(w, RECIPES[name])
    assert refusal.value.code == BAD_DATA


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", NEAREST)
def test_rtn_is_gptq_with_nothing_to_correct(scheme, symmetric):
    """What GPTQ makes of inputs that are independent and alike, bit for bit; zero groups too."""
    bits = SCHEMES[NEAREST[scheme]].bits
    w = gaussian(16, 256)
    w[3, :64] = 0
    w[4] = 0
    recipe = Recipe(scheme=scheme, group_size=64, symmetric=symmetric)
    q = quantize(w, recipe)
    grid = {"bits": bits, "group": 64, "symmetric": symmetric, "scale_dtype": SCALES}
    solved = solve(jnp.asarray(w), jnp.eye(256), act_order=False, damp=jnp.float32(0.01), **grid)
    want = tensor_of(solved, GptqRecipe(bits=bits, group=64, symmetric=symmetric))
    assert q.scheme == want.scheme == f"gptq{bits}"
    np.testing.assert_array_equal(q.codes, want.codes)
    np.testing.assert_array_equal(q.scales, want.scales)
    np.testing.assert_array_equal(dequantized(q), round_to_nearest(jnp.asarray(w), **grid))
    assert (q.zeros is None) == symmetric


def test_rtn_refuses_rows_of_no_whole_groups():
    with pytest.raises(MixtralError, match="--group-size 64") as refusal:
        quantize(gaussian(4, 64), Recipe(scheme="rtn3"))
    assert refusal.value.code == BAD_CONFIG
