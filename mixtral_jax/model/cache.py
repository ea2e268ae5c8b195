"""The rolling key/value cache: static shapes, donated, an argument and a result.

A token at absolute position p lies in slot p mod S. Every slot remembers the position it holds, so
a mask is a comparison of positions and wrap-around needs no special case. Reading T tokens at once
through a window of W needs S >= W + T - 1 slots, or the chunk would overwrite keys that its first
query still attends to.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.attention import EMPTY
from mixtral_jax.kernels.rows import write_rows
from mixtral_jax.kernels.scaled_kv import KV, ScaledKV, empty_kv, quantize_kv

# Heads before slots: products read them as they lie.
KV_AXES = ("batch", "kv_heads", "slots", "channels")  # the scales of a ScaledKV lack the last
SLOT_AXIS = KV_AXES.index("slots")


class KVCache(NamedTuple):
    """Keys and values of every layer, ``[B, K, S, C]`` each, plain arrays or ScaledKV.

    ``positions`` is the absolute position in each slot (EMPTY if none), ``lengths`` the number of
    tokens each row has seen.
    """

    keys: tuple[KV, ...]
    values: tuple[KV, ...]
    positions: Int[Array, "B S"]
    lengths: Int[Array, " B"]


class Window(NamedTuple):
    """Where the tokens of one call stand, and what stands in each slot that they may attend to.

    ``slots`` is where each token is written; padding has a slot past the end, which writes nothing.
    """

    positions: Int[Array, "B T"]
    slots: Int[Array, "B T"]
    key_positions: Int[Array, "B S"]


def num_slots(config: ModelConfig, *, total: int, chunk: int) -> int:
    """Slots for ``total`` tokens per row read at most ``chunk`` at a time."""
    if config.sliding_window is None:
        return total
    return min(total, config.sliding_window + chunk - 1)


def init_cache(config: ModelConfig, *, rows: int, slots: int, dtype: Any) -> KVCache:
    """An empty cache; of ScaledKV where ``dtype`` is one of ``KV_DTYPES``."""
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache(
        keys=tuple(empty_kv(shape, dtype) for _ in layers),
        values=tuple(empty_kv(shape, dtype) for _ in layers),
        positions=jnp.full((rows, slots), EMPTY, jnp.int32),
        lengths=jnp.zeros((rows,), jnp.int32),
    )


def advance(cache: KVCache, valid: Bool[Array, "B T"]) -> tuple[KVCache, Window]:
    """Makes room for the next tokens of every row: positions and slots.

    Args:
        cache: the cache before these tokens.
        valid: false for padding, which follows the tokens of its row.

    Returns:
        The cache with positions and lengths advanced (keys and values are still to be written by
        ``write_kv``), and the tokens' Window.
    """
    size = cache.positions.shape[1]
    steps = jnp.arange(valid.shape[1], dtype=jnp.int32)
    positions = cache.lengths[:, None] + steps[None, :]
    slots = jnp.where(valid, positions % size, size)
    written = write_rows(cache.positions, positions, slots)
    lengths = cache.lengths + valid.sum(axis=1, dtype=jnp.int32)
    return cache._replace(positions=written, lengths=lengths), Window(positions, slots, written)


def rewind(cache: KVCache, lengths: Int[Array, " B"], most: int) -> KVCache:
    """Takes back the last tokens of every row, as if they had not been read.

    Their slots become EMPTY, and zero: a NaN left in one would reach every query of its row, since
    a product with a masked NaN is NaN. What they overwrote in a ring does not come back: reading T
    tokens needs S >= W + T - 1 slots whether they stay or not.

    Args:
        cache: any.
        lengths: tokens of each row that stay.
        most: no row takes back more than so many.
    """
    size = cache.positions.shape[1]
    positions = lengths[:, None] + jnp.arange(most, dtype=jnp.int32)
    slots = jnp.where(positions < cache.lengths[:, None], positions % size, size)

    def fill(target: jax.Array, value: int, axis: int) -> jax.Array:
        shape = list(target.shape)
        shape[axis] = most
        return write_rows(target, jnp.full(shape, value), slots, axis)

    keys, values = jax.tree.map(lambda x: fill(x, 0, SLOT_AXIS), (cache.keys, cache.values))
    return KVCache(keys, values, fill(cache.positions, EMPTY, 1), lengths)


def write_kv(target: KV, new: Float[Array, "B K T C"], slots: Int[Array, "B T"]) -> KV:
    """Writes keys or values; into a ScaledKV their codes and scales, alike in any chunk."""
    if not isinstance(target, ScaledKV):
        return write_rows(target, new, slots, SLOT_AXIS)
    made = quantize_kv(new, target.codes.dtype)
    pairs = zip(target, made, strict=True)
    return ScaledKV(*(write_rows(old, new, slots, SLOT_AXIS) for old, new in pairs))
