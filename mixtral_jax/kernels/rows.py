"""Rows of tables by index: reads from an embedding, writes into a cache.

XLA's CPU compiler has no gather or scatter of 16-bit floats: it widens the operand to f32 and, for
a scatter, narrows it again.
"""

from __future__ import annotations

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
    """Rows of an embedding; the reference of ``lookup_in_place``."""
    return table[ids]


def lookup_in_place(
    table: Float[Array, "V D"], ids: Int[Array, "*rows"]
) -> Float[Array, "*rows D"]:
    """``lookup`` that no loop is freed of: outside, the whole table would be widened."""
    table, ids = jax.lax.optimization_barrier((table, ids))
    return table[ids]


def write_rows(
    target: Num[Array, "B ..."], new: Num[Array, "B ..."], slots: Int[Array, "B T"], axis: int = 1
) -> Num[Array, "B ..."]:
    """Writes ``new[b, t]`` to ``target[b, slots[b, t]]``; slots past the end are left out.

    ``axis`` is where the slots of ``target``, and the tokens of ``new``, are counted: 1, or 2 where
    a dim of heads stands before them. 16-bit floats move as integers, which costs the CPU two
    passes over the target and not three; not differentiable: caches are not trained through.
    """

    def write_row(target: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
        return target.at[(slice(None),) * (axis - 1) + (slots,)].set(new, mode="drop")

    written = jax.vmap(write_row)(_bits(target), _bits(new.astype(target.dtype)), slots)
    return _like(written, target.dtype)
