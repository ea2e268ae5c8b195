"""Keys and values in 8 bits: codes, and one scale for each head of each position.

A scale per vector needs no calibration and never changes once written, so the cache stays a ring
that is only written to. Scores are multiplied by the scales of the keys, shares by those of the
values: no vector is ever restored.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

KVDtype = Literal["int8", "fp8"]
KV_DTYPES: dict[str, Any] = {
    "int8": jnp.dtype(jnp.int8),
    "fp8": jnp.dtype(jnp.float8_e4m3fn),
}
_LARGEST = {KV_DTYPES["int8"]: 127.0, KV_DTYPES["fp8"]: 448.0}  # codes are symmetric about 0


class ScaledKV(NamedTuple):
    """Keys or values as ``codes * scales``, in place of an array ``[B, S, K, C]``."""

    codes: Num[Array, "B S K C"]
    scales: Float[Array, "B S K"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that this stands for."""
        return self.codes.shape


KV: TypeAlias = Float[Array, "B S K C"] | ScaledKV


def storage_dtype(kv_dtype: str | None, activations: Any) -> Any:
    """The dtype of the cache's codes, or without ``kv_dtype`` that of its plain arrays."""
    return jnp.dtype(activations) if kv_dtype is None else KV_DTYPES[kv_dtype]


def empty_kv(shape: tuple[int, int, int, int], dtype: Any) -> KV:
    """Zeros ``[B, S, K, C]``: a ScaledKV where ``dtype`` is one of codes, else an array."""
    zeros = jnp.zeros(shape, dtype)
    if jnp.dtype(dtype) not in _LARGEST:
        return zeros
    return ScaledKV(zeros, jnp.zeros(shape[:-1], jnp.float32))


def quantize_kv(x: Float[Array, "B S K C"], dtype: Any) -> ScaledKV:
    """Symmetric codes whose largest magnitude in each vector is the dtype's own (127 or 448).

    int8 codes round to nearest: no element is off by more than half its scale. A vector of zeros
    has scale 0. One that holds NaN or infinity has scale NaN, which reaches the logits: a bad row
    is found as it is without codes.
    """
    largest = _LARGEST[jnp.dtype(dtype)]
    vectors = x.astype(jnp.float32)
    most = jnp.abs(vectors).max(axis=-1)
    scales = jnp.where(jnp.isfinite(most), most / largest, jnp.nan)
    codes = vectors / jnp.where(scales == 0, 1.0, scales)[..., None]
    codes = jnp.clip(codes, -largest, largest)  # a subnormal scale is not that exact
    if jnp.issubdtype(dtype, jnp.integer):
        codes = jnp.round(codes)
    return ScaledKV(codes.astype(dtype), scales)
