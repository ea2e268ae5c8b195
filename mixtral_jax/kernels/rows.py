"""Rows of tables by index: reads from an embedding, writes into a cache.

XLA's CPU compiler has no gather or scatter of 16-bit floats: it widens the whole table to f32 and,
for a scatter, narrows it again, each time. The same bits as integers it moves as they are.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

_INTEGERS = {1: jnp.uint8, 2: jnp.uint16}


def _bits(x: jax.Array) -> jax.Array:
    """Narrow floats as integers of their size; anything else as it is."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize in _INTEGERS
    return jax.lax.bitcast_convert_type(x, _INTEGERS[x.dtype.itemsize]) if narrow else x


def _like(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return bits if bits.dtype == dtype else jax.lax.bitcast_convert_type(bits, dtype)


def lookup(table: Float[Array, "V D"], ids: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """Rows of an embedding; the reference of ``lookup_bits``."""
    return table[ids]


@jax.custom_vjp
def lookup_bits(table: Float[Array, "V D"], ids: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
    """``lookup`` that moves bits: no copy of the table. Not for a table split over GPUs (NCCL does
    not add 16-bit integers).
    """
    return _like(_bits(table)[ids], table.dtype)


def _forward(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lookup_bits(table, ids), (table, ids)


def _backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, None]:
    table, ids = saved
    (gradient,) = jax.vjp(functools.partial(lookup, ids=ids), table)[1](g)
    return gradient, None


lookup_bits.defvjp(_forward, _backward)


def write_rows(
    target: Num[Array, "B S *dims"], new: Num[Array, "B T *dims"], slots: Int[Array, "B T"]
) -> Num[Array, "B S *dims"]:
    """Writes ``new[b, t]`` to ``target[b, slots[b, t]]``; slots past the end are left out.

    Not differentiable where the dtype is narrow: caches are not trained through.
    """

    def write_row(target: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
        return target.at[slots].set(new, mode="drop")

    written = jax.vmap(write_row)(_bits(target), _bits(new.astype(target.dtype)), slots)
    return _like(written, target.dtype)
