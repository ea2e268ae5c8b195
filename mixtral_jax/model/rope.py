"""Rotary position embedding (Su et al. 2021), half-split layout as in transformers.

Native Mistral weights are interleaved pairs; they are permuted once, in convert/, so that the model
knows one layout only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Rotation(NamedTuple):
    """Cosines and sines for each position, f32, ``[B, T, 1, C/2]``."""

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]


def rotation(positions: Int[Array, "B T"], *, head_dim: int, theta: float) -> Rotation:
    """Angles position * theta^(-2i/C) for i < C/2, as cosines and sines."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    # f32: at position 32768 a bf16 angle would be off by hundreds of radians.
    angles = positions.astype(jnp.float32)[..., None] * (theta**-exponents)
    angles = angles[:, :, None, :]
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "B T heads C"], by: Rotation) -> Float[Array, "B T heads C"]:
    """Rotates pairs (i, i + C/2) of every head; the dtype is kept."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = by.cos.astype(x.dtype), by.sin.astype(x.dtype)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
