"""Products of activations with any kind of weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mixtral_jax.weights import Adapted, Matrix, QTensor, RowAdapted

# A product of rows ``[N, I]`` with an array or a QTensor ``[O, I]``: f32 ``[N, O]``.
Product = Callable[[jax.Array, jax.Array | QTensor], jax.Array]


def precision_of(x: jax.Array) -> jax.lax.Precision | None:
    """HIGHEST for f32: f32 means f32 (a GPU would round the operands to TF32)."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def rows_first(x: Float[Array, "N I"], w: jax.Array | QTensor) -> Float[Array, "N O"]:
    """The rows as the left operand; f32."""
    plain = w.dequantize() if isinstance(w, QTensor) else w
    return jnp.einsum(
        "NI,OI->NO", x, plain, precision=precision_of(x), preferred_element_type=jnp.float32
    )


def contract(
    einsum: str, x: jax.Array, w: Matrix, *, dtype: Any = None, product: Product = rows_first
) -> jax.Array:
    """Multiplies activations by one matrix, accumulating in f32.

    Args:
        einsum: letters of ``model/axes.py``, ``"BTD,OD->BTO"``: the matrix is ``[out, in]`` and its
            last letter is summed over.
        x: activations.
        w: an array, a QTensor, an Adapted, or, for rows ``[B, T, I]``, a RowAdapted.
        dtype: of the result; the dtype of ``x`` unless given.
        product: what multiplies rows with a matrix.

    Returns:
        The product, in ``dtype``.
    """
    dtype = dtype or x.dtype
    if isinstance(w, QTensor) and w.order is not None:
        x, w = x[..., w.order], dataclasses.replace(w, order=None)
    if isinstance(w, Adapted):
        return _contract_adapted(einsum, x, w, product).astype(dtype)
    if isinstance(w, RowAdapted):
        return _contract_row_adapted(einsum, x, w, product).astype(dtype)
    # One flat product: with more dims XLA's CPU compiler transposes the weight into a copy.
    out = product(x.reshape(-1, x.shape[-1]), w)
    return out.astype(dtype).reshape(*x.shape[:-1], w.shape[0])


def _contract_adapted(einsum: str, x: jax.Array, w: Adapted, product: Product) -> jax.Array:
    """base x + scale * b (a x); the update is never added to the base."""
    operands, result = einsum.split("->")
    letters, (out, summed) = operands.split(",")
    low_rank = letters.replace(summed, "R")
    base = contract(einsum, x, w.base, dtype=jnp.float32, product=product)
    if w.key is not None and w.dropout:
        is_seen = jax.random.bernoulli(w.key, 1 - w.dropout, x.shape)
        x = jnp.where(is_seen, x / (1 - w.dropout), 0).astype(x.dtype)
    a = w.a.astype(x.dtype)
    reduced = contract(f"{letters},R{summed}->{low_rank}", x, a, dtype=x.dtype, product=product)
    b = w.b.astype(x.dtype)
    update = contract(
        f"{low_rank},{out}R->{result}", reduced, b, dtype=jnp.float32, product=product
    )
    return base + w.scale * update


def _contract_row_adapted(
    einsum: str, x: Float[Array, "B T I"], w: RowAdapted, product: Product
) -> Float[Array, "B T O"]:
    """As ``_contract_adapted``, with the factors of each row's own adapter."""
    base = contract(einsum, x, w.base, dtype=jnp.float32, product=product)
    if w.ids is None:
        return base
    multiply = functools.partial(
        jnp.einsum, precision=precision_of(x), preferred_element_type=jnp.float32
    )
    reduced = multiply("BTI,BRI->BTR", x, w.a[w.ids].astype(x.dtype)).astype(x.dtype)
    update = multiply("BTR,BOR->BTO", reduced, w.b[w.ids].astype(x.dtype))
    return base + w.scales[w.ids][:, None, None] * update
