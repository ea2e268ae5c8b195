"""Root-mean-square normalisation (Zhang & Sennrich 2019), as in MixtralRMSNorm of transformers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mixtral_jax.weights import weight


class RMSNorm(nnx.Module):
    """Normalises in f32, returns to the input's dtype, then multiplies by the weight."""

    def __init__(self, channels: int, *, eps: float, dtype: Any):
        self.eps = eps
        self.weight = weight(None, (channels,), ("norm",), dtype=dtype, std=None)

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        """Normalises the last dim."""
        # f32: the mean of squares of bf16 loses most of its digits over 4096 channels.
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale).astype(x.dtype) * self.weight[...]
