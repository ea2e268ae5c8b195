"""Adam whose moments are 8-bit codes: about 2 bytes per weight in place of 8.

After Dettmers et al. 2021 (arXiv 2110.02861) and bitsandbytes: moments are codes of
``dynamic_map`` times the largest absolute value of their block of 256; every update is computed in
f32. Two things differ. Blocks never cross matrices or, where sizes allow, devices: they are tiles
of a matrix (256 columns of a row, or whole rows where these are shorter), so that codes and scales
lie on the mesh as their weights do. And a square that is not zero is not rounded to zero: the mean
beside it, whose code has a sign, may be none, and would be divided by epsilon.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from mixtral_jax.qtensor import dynamic_map

BLOCK = 256  # values of a scale
LEAST = 4096  # values of a leaf in 8 bits; smaller ones stay in f32, as in bitsandbytes
_ZERO = 127  # the code of zero, where there are signs
_LEAST_BLOCK = 64  # of sizes that no larger one divides: they stay in f32


class Moment(NamedTuple):
    """A moment of one leaf.

    Attributes:
        codes: into ``dynamic_map``, with the shape of the leaf.
        scales: of tiles of the last two dims.
    """

    codes: UInt8[Array, "*_"]
    scales: Float[Array, "*_"]


class AdamState(NamedTuple):
    """Updates made, and both moments: a Moment, or an array in f32, for each leaf."""

    count: jax.Array
    mu: Any
    nu: Any


def is_moment(leaf: object) -> bool:
    """Whether a leaf of a state is a Moment."""
    return isinstance(leaf, Moment)


def tile_of(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a leaf that share a scale; None where it stays in f32."""
    if math.prod(shape) < LEAST:
        return None
    rows, columns = (1, *shape)[-2:]
    wide = math.gcd(columns, BLOCK)
    high = math.gcd(rows, BLOCK // wide)
    return (high, wide) if high * wide >= _LEAST_BLOCK else None


def scale_sharding(own: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Where the scales lie of codes that lie as ``own``: with them, or whole in a dim in which a
    device has no whole number of tiles."""
    tile = tile_of(shape)
    assert tile is not None
    sizes = _tiled(shape, tile)

    def entry(axes: Any, size: int) -> Any:
        names = axes if isinstance(axes, tuple) else () if axes is None else (axes,)
        return axes if size % math.prod(own.mesh.shape[name] for name in names) == 0 else None

    spec = (*own.spec, *[None] * (len(shape) - len(own.spec)))
    return NamedSharding(own.mesh, PartitionSpec(*map(entry, spec, sizes)))


def encode(values: Float[Array, "*_"], *, is_signed: bool) -> Moment:
    """Codes of a moment whose leaf has tiles."""
    tile = tile_of(values.shape)
    assert tile is not None
    tiles = _apart(values, tile)
    scales = jnp.abs(tiles).max(axis=(-3, -1))
    shares = tiles / jnp.where(scales == 0, 1, scales)[..., :, None, :, None]
    ranks = _ranks(jnp.abs(shares), is_signed=is_signed)
    if is_signed:  # there is no -1
        ranks = jnp.where(shares < 0, _ZERO - jnp.minimum(ranks, _ZERO), _ZERO + ranks)
    else:
        ranks = jnp.where(shares > 0, jnp.maximum(ranks, 1), ranks)
    codes = ranks.astype(jnp.uint8)
    if values.ndim == 1:
        scales = scales[0]
    return Moment(codes.reshape(values.shape), scales)


def _ranks(shares: jax.Array, *, is_signed: bool) -> jax.Array:
    """The place of the nearest value among those of ``dynamic_map`` from 0 to 1, int32.

    By arithmetic, which the compiler fuses: a binary search takes as much memory as four copies.
    """
    table = dynamic_map(is_signed=is_signed)
    values = table[table >= 0].astype(np.float64)
    between = (values[1:] + values[:-1]) / 2
    rank = jnp.zeros(shares.shape, jnp.int32)
    first = 1  # of the values of a power of ten
    for power in range(7):
        count = 2 ** (power if is_signed else power + 1)
        share = (shares * 10.0 ** (6 - power) - 0.1) * (count / 0.9)
        within = first + jnp.clip(share.astype(jnp.int32), 0, count - 1)
        rank = jnp.where(shares > between[first - 1], within, rank)
        first += count
    return jnp.where(shares > between[first - 1], first, rank)


def decode(moment: Moment, *, is_signed: bool) -> Float[Array, "*_"]:
    """The f32 values that codes stand for."""
    shape = moment.codes.shape
    tile = tile_of(shape)
    assert tile is not None
    tiles = jnp.asarray(dynamic_map(is_signed=is_signed))[_apart(moment.codes, tile)]
    scales = moment.scales[None] if len(shape) == 1 else moment.scales
    return (tiles * scales[..., :, None, :, None]).reshape(shape)


def scale_by_adam_8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` with moments in 8 bits between updates."""

    def init(params: Any) -> Any:
        def first(is_signed: bool) -> Any:
            return jax.tree.map(lambda leaf: _zeros(leaf.shape, is_signed=is_signed), params)

        return AdamState(jnp.int32(0), first(True), first(False))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        count = state.count + 1
        weights = 1 - b1 ** count.astype(jnp.float32), 1 - b2 ** count.astype(jnp.float32)

        def one(g: jax.Array, mu: Any, nu: Any) -> _Updated:
            mean = b1 * _read(mu, is_signed=True) + (1 - b1) * g
            square = b2 * _read(nu, is_signed=False) + (1 - b2) * g * g
            change = (mean / weights[0]) / (jnp.sqrt(square / weights[1]) + eps)
            return _Updated(
                change, _kept(mean, mu, is_signed=True), _kept(square, nu, is_signed=False)
            )

        found = jax.tree.map(one, updates, state.mu, state.nu)

        def part(i: int) -> Any:
            return jax.tree.map(lambda x: x[i], found, is_leaf=lambda x: isinstance(x, _Updated))

        return part(0), AdamState(count, part(1), part(2))

    return optax.GradientTransformation(init, update)


class _Updated(NamedTuple):
    change: Any
    mu: Any
    nu: Any


def _read(moment: Any, *, is_signed: bool) -> jax.Array:
    return decode(moment, is_signed=is_signed) if is_moment(moment) else moment


def _kept(values: jax.Array, like: Any, *, is_signed: bool) -> Any:
    return encode(values, is_signed=is_signed) if is_moment(like) else values


def _zeros(shape: tuple[int, ...], *, is_signed: bool) -> Any:
    tile = tile_of(shape)
    if tile is None:
        return jnp.zeros(shape, jnp.float32)
    codes = jnp.full(shape, _ZERO if is_signed else 0, jnp.uint8)
    return Moment(codes, jnp.zeros(_tiled(shape, tile), jnp.float32))


def _tiled(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, ...]:
    """How many tiles there are along each dim; along those of a stack as many as matrices."""
    if len(shape) == 1:
        return (shape[0] // tile[1],)
    return (*shape[:-2], shape[-2] // tile[0], shape[-1] // tile[1])


def _apart(values: jax.Array, tile: tuple[int, int]) -> jax.Array:
    """``[..., O, I]`` as ``[..., O/h, h, I/w, w]``."""
    *stack, rows, columns = (1, *values.shape) if values.ndim == 1 else values.shape
    return values.reshape(*stack, rows // tile[0], tile[0], columns // tile[1], tile[1])
