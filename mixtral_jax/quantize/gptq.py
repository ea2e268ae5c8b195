"""GPTQ: codes of a matrix that keep its products with calibration inputs (arXiv 2210.17323).

Column after column is rounded, and what rounding did to the outputs is made up for in the columns
still to come, as the inverse of the Hessian of ||(W - Q) X||^2 tells. Everything is computed in the
dtype of the Hessian.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

BLOCK = 128  # columns whose corrections of the rest are gathered into one product


class Grid(NamedTuple):
    """Steps and zero points of groups; a code stands for (code - zero) * scale."""

    scales: Float[Array, "O G"]
    zeros: Float[Array, "O G"]


class Solved(NamedTuple):
    """A quantized matrix whose column j is that of input ``order[j]``; groups are contiguous."""

    codes: UInt8[Array, "O I"]
    scales: Float[Array, "O G"]
    zeros: UInt8[Array, "O G"]
    order: Int[Array, " I"]


def add_hessian(
    hessian: Float[Array, "I I"], x: Float[Array, "N I"], weights: Float[Array, " N"]
) -> Float[Array, "I I"]:
    """Adds 2 X^T diag(weights) X for the rows of inputs; a weight of 0 leaves a row out."""
    x = x.astype(hessian.dtype)
    highest = jax.lax.Precision.HIGHEST
    return hessian + 2 * jnp.matmul((x * weights[:, None]).T, x, precision=highest)


def find_grid(
    w: Float[Array, "O G N"], *, bits: int, symmetric: bool, scale_dtype: Any = None
) -> Grid:
    """The min-max grid of each group of N values, as GPTQ and round to nearest use it.

    Asymmetric: 2^bits - 1 steps from the smallest value to the largest, zero among them.
    Symmetric: as many steps around zero, from minus the largest magnitude to it.

    Args:
        w: values by group.
        bits: of a code.
        symmetric: the zero point is the middle code.
        scale_dtype: what scales are rounded to, before codes are chosen.
    """
    most = 2**bits - 1
    low, high = w.min(axis=-1).clip(max=0), w.max(axis=-1).clip(min=0)
    if symmetric:
        high = jnp.maximum(-low, high)
        low = -high
    spread = jnp.where(high == low, 2, high - low)  # a group of zeros: any step will do
    scales = spread / most
    if scale_dtype is not None:
        scales = scales.astype(scale_dtype).astype(w.dtype)
    # A step that the dtype rounds to nothing stands for values that are nothing.
    scales = jnp.where(scales == 0, 1, scales)
    middle = jnp.full_like(low, 2 ** (bits - 1))
    zeros = middle if symmetric else jnp.round(-low / scales).clip(0, most)
    return Grid(scales, zeros)


def to_codes(w: jax.Array, scales: jax.Array, zeros: jax.Array, bits: int) -> jax.Array:
    """The nearest code of each value, in the dtype of ``w``."""
    return (jnp.round(w / scales) + zeros).clip(0, 2**bits - 1)


@functools.partial(jax.jit, static_argnames=("bits", "group", "symmetric", "scale_dtype"))
def round_to_nearest(
    w: Float[Array, "O I"],
    *,
    bits: int,
    group: int | None,
    symmetric: bool,
    scale_dtype: Any = None,
) -> Float[Array, "O I"]:
    """What the same grid makes of ``w`` where each value is rounded by itself."""
    grouped = w.reshape(w.shape[0], -1, group or w.shape[1])
    grid = find_grid(grouped, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
    scales, zeros = grid.scales[..., None], grid.zeros[..., None]
    return ((to_codes(grouped, scales, zeros, bits) - zeros) * scales).reshape(w.shape)


def inverse_factor(hessian: Float[Array, "I I"], damp: jax.Array) -> Float[Array, "I I"]:
    """The upper Cholesky factor U of the inverse of the damped Hessian: its inverse is U^T U.

    With H = R R^T, R upper triangular, U is the inverse of R, and R is the Cholesky factor of H
    with rows and columns turned about: H is never inverted, which in f32 would cost digits.

    Args:
        hessian: symmetric.
        damp: this share of the mean of the diagonal is added to the diagonal.
    """
    size = hessian.shape[0]
    mean = jnp.mean(jnp.diagonal(hessian))
    damped = hessian + (damp * mean) * jnp.eye(size, dtype=hessian.dtype)
    factor = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
    eye = jnp.eye(size, dtype=hessian.dtype)
    return jax.scipy.linalg.solve_triangular(factor, eye, lower=False)


class Rounded(NamedTuple):
    """Codes of numbers, and what they stand for."""

    codes: jax.Array
    values: jax.Array


class _Block(NamedTuple):
    codes: jax.Array  # [N, O]
    errors: jax.Array  # [N, O], each over the diagonal of the factor


def _solve_block(
    w: jax.Array, factor: jax.Array, rounded: Callable[[jax.Array], Rounded]
) -> _Block:
    """Rounds the columns of one block, ``w`` [N, O] as rows, each correcting those after it."""

    def column(i: jax.Array, state: tuple) -> tuple:
        w, codes, errors = state
        code, value = rounded(w[i])
        error = (w[i] - value) / factor[i, i]
        w = w - factor[i][:, None] * error[None, :]
        return w, codes.at[i].set(code), errors.at[i].set(error)

    empty = jnp.zeros_like(w)
    _, codes, errors = jax.lax.fori_loop(0, w.shape[0], column, (w, empty, empty))
    return _Block(codes, errors)


def sweep(
    w: Float[Array, "I O"],
    factor: Float[Array, "I I"],
    size: int,
    grid_of: Callable[[jax.Array], Any],
    rounded: Callable[[Any, jax.Array], Rounded],
) -> tuple[Float[Array, "I O"], Any]:
    """Rounds column after column; what rounding did is made up for in the columns after it.

    Args:
        w: the columns of a matrix as rows.
        factor: ``inverse_factor`` of the Hessian of the inputs.
        size: columns of a block; divides I.
        grid_of: the grid of a block ``[size, O]``, seen when all columns before it are rounded.
        rounded: the codes of a column on a grid.

    Returns:
        The codes, in the dtype of ``w``, and the grids, stacked.
    """

    def block(left: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        here = jax.lax.dynamic_slice_in_dim(left, start, size)
        rows = jax.lax.dynamic_slice_in_dim(factor, start, size)
        square = jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1)
        grid = grid_of(here)
        made = _solve_block(here, square, functools.partial(rounded, grid))
        # Columns of this block change as well, but nobody reads them again.
        highest = jax.lax.Precision.HIGHEST
        left = left - jnp.matmul(rows.T, made.errors, precision=highest)
        return left, (made.codes, grid)

    _, (codes, grids) = jax.lax.scan(block, w, jnp.arange(0, w.shape[0], size))
    return codes.reshape(w.shape), grids


def block_size(num_inputs: int) -> int:
    """Columns of a block where no group says."""
    return math.gcd(BLOCK, num_inputs)


class Prepared(NamedTuple):
    """A matrix and the factor of its Hessian, with columns in the order of ``order``."""

    w: Float[Array, "O I"]
    factor: Float[Array, "I I"]
    order: Int[Array, " I"]


def prepared(
    w: Float[Array, "O I"],
    hessian: Float[Array, "I I"],
    *,
    act_order: bool,
    damp: Float[Array, ""],
) -> Prepared:
    """What ``sweep`` needs. An input that calibration never moved gets weight zero."""
    w = w.astype(hessian.dtype)
    diagonal = jnp.diagonal(hessian)
    is_dead = diagonal == 0
    w = jnp.where(is_dead[None, :], 0, w)
    hessian = hessian + jnp.diag(is_dead.astype(hessian.dtype))
    order = jnp.arange(w.shape[1])
    if act_order:
        order = jnp.argsort(-diagonal, stable=True)
        w, hessian = w[:, order], hessian[order][:, order]
    return Prepared(w, inverse_factor(hessian, damp), order)


@functools.partial(
    jax.jit, static_argnames=("bits", "group", "symmetric", "act_order", "scale_dtype")
)
def solve(
    w: Float[Array, "O I"],
    hessian: Float[Array, "I I"],
    *,
    bits: int,
    group: int | None,
    symmetric: bool,
    act_order: bool,
    damp: Float[Array, ""],
    scale_dtype: Any = None,
) -> Solved:
    """Quantizes a matrix (algorithm 1 of the paper; groups as its section 5 does them).

    The grid of a group is found when its first column is reached, from weights that all earlier
    columns have corrected; without groups it is found once, from the matrix as it is. An input
    that calibration never moved gets weight zero.

    Args:
        w: weights.
        hessian: of the inputs, as ``add_hessian`` sums it.
        bits: of a code: 2, 3, 4 or 8.
        group: consecutive columns that share a scale, or None for a whole row.
        symmetric: the zero point is the middle code.
        act_order: columns of large diagonal first ("activation order"), so that the groups are of
            columns in that order.
        damp: see ``inverse_factor``.
        scale_dtype: see ``find_grid``.

    Returns:
        Solved; its scales are NaN if the damped Hessian is not positive definite.
    """
    w, factor, order = prepared(w, hessian, act_order=act_order, damp=damp)
    find = functools.partial(find_grid, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
    whole = find(w[:, None, :])

    def grid_of(block: jax.Array) -> Grid:
        return whole if group is None else find(block.T[:, None, :])

    def rounded(grid: Grid, column: jax.Array) -> Rounded:
        scales, zeros = grid.scales[:, 0], grid.zeros[:, 0]
        codes = to_codes(column, scales, zeros, bits)
        return Rounded(codes, (codes - zeros) * scales)

    size = group or block_size(w.shape[1])
    codes, grids = sweep(w.T, factor, size, grid_of, rounded)
    grid = whole
    if group is not None:
        grid = Grid(grids.scales[..., 0].T, grids.zeros[..., 0].T)
    is_bad = ~jnp.isfinite(factor).all()
    return Solved(
        codes.T.astype(jnp.uint8),
        jnp.where(is_bad, jnp.nan, grid.scales),
        grid.zeros.astype(jnp.uint8),
        order.astype(jnp.int32),
    )


@jax.jit
def output_error(change: Float[Array, "O I"], hessian: Float[Array, "I I"]) -> Float[Array, ""]:
    """||change X||^2 over the calibration inputs, from their Hessian 2 X X^T."""
    highest = jax.lax.Precision.HIGHEST
    moved = jnp.matmul(change.astype(hessian.dtype), hessian, precision=highest)
    return (moved * change).sum() / 2
