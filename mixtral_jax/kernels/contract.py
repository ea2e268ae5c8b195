"""Products of activations with any kind of weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.weights import Adapted, Matrix, QTensor


def contract(einsum: str, x: jax.Array, w: Matrix, *, dtype: Any = None) -> jax.Array:
    """Multiplies activations by one matrix, accumulating in f32.

    Args:
        einsum: letters of ``model/axes.py``, ``"BTD,OD->BTO"``: the matrix is ``[out, in]`` and its
            last letter is summed over.
        x: activations.
        w: an array, a QTensor or an Adapted.
        dtype: of the result; the dtype of ``x`` unless given.

    Returns:
        The product, in ``dtype``.
    """
    dtype = dtype or x.dtype
    if isinstance(w, QTensor):
        if w.order is not None:
            x, w = x[..., w.order], dataclasses.replace(w, order=None)
        w = w.dequantize()
    if isinstance(w, Adapted):
        return _contract_adapted(einsum, x, w).astype(dtype)
    # HIGHEST: f32 means f32 (a GPU would round the operands to TF32).
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    # One flat product: with more dims XLA's CPU compiler transposes the weight into a copy.
    product = jnp.einsum(
        "NI,OI->NO",
        x.reshape(-1, x.shape[-1]),
        w,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return product.astype(dtype).reshape(*x.shape[:-1], w.shape[0])


def _contract_adapted(einsum: str, x: jax.Array, w: Adapted) -> jax.Array:
    """base x + scale * b (a x); the update is never added to the base."""
    operands, result = einsum.split("->")
    letters, (out, summed) = operands.split(",")
    low_rank = letters.replace(summed, "R")
    base = contract(einsum, x, w.base, dtype=jnp.float32)
    a = w.a.astype(x.dtype)
    reduced = contract(f"{letters},R{summed}->{low_rank}", x, a, dtype=x.dtype)
    update = contract(
        f"{low_rank},{out}R->{result}", reduced, w.b.astype(x.dtype), dtype=jnp.float32
    )
    return base + w.scale * update
