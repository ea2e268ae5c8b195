"""Grouped-query attention over explicit masks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B S K C"],
    v: Float[Array, "B S K C"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H C"]:
    """Softmax attention, scores and softmax in f32; the reference for every faster path.

    Query heads ``g * 1 .. G`` of key/value head k are ``k * G + g``, as in transformers'
    ``repeat_kv``. A query whose mask is all false gets some finite value.
    """
    B, T, H, C = q.shape
    K = k.shape[2]
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    grouped = q.reshape(B, T, K, H // K, C)
    scores = jnp.einsum(
        "BTKGC,BSKC->BKGTS", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask[:, None, None], scores * C**-0.5, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum(
        "BKGTS,BSKC->BTKGC",
        probabilities,
        v,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return out.astype(q.dtype).reshape(B, T, H, C)
