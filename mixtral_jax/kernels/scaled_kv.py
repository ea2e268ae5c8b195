"""Keys and values in 8 bits: codes, and one scale for each head of each position.

A scale per vector needs no calibration and never changes once written, so the cache stays a ring
that is only written to. Scores are multiplied by the scales of the keys, shares by those of the
values: no vector is ever restored.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

KVDtype = Literal["int8", "fp8"]
# fp8 (e4m3fn) lies in the cache as its bytes: where a compiler lacks the type, a write to an array
# of it, or a slice, converts the whole to float16 (the CPU's and the A100's).
KV_DTYPES: dict[KVDtype, Any] = {"int8": jnp.dtype(jnp.int8), "fp8": jnp.dtype(jnp.uint8)}
_LARGEST = {KV_DTYPES["int8"]: 127.0, KV_DTYPES["fp8"]: 448.0}  # codes are symmetric about 0


class ScaledKV(NamedTuple):
    """Keys or values as codes times scales, in place of an array ``[B, K, S, C]``.

    Codes are int8, or uint8: the bytes of e4m3fn numbers.
    """

    codes: Int8[Array, "B K S C"] | UInt8[Array, "B K S C"]
    scales: Float[Array, "B K S"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that this stands for."""
        return self.codes.shape

    def widened(self, dtype: Any) -> Float[Array, "B K S C"]:
        """The codes as numbers of ``dtype``, exact in bf16, f16 and f32; scales are left out."""
        if self.codes.dtype == jnp.int8:
            return self.codes.astype(dtype)
        return jax.lax.bitcast_convert_type(self.codes, jnp.float8_e4m3fn).astype(dtype)


KV: TypeAlias = Float[Array, "B K S C"] | ScaledKV


def storage_dtype(kv_dtype: KVDtype | None, activations: Any) -> Any:
    """The dtype of the cache's codes or, without ``kv_dtype``, of its plain arrays."""
    return jnp.dtype(activations) if kv_dtype is None else KV_DTYPES[kv_dtype]


def empty_kv(shape: tuple[int, int, int, int], dtype: Any) -> KV:
    """Zeros ``[B, K, S, C]``: a ScaledKV where ``dtype`` is one of codes, else an array."""
    zeros = jnp.zeros(shape, dtype)
    if jnp.dtype(dtype) not in _LARGEST:
        return zeros
    return ScaledKV(zeros, jnp.zeros(shape[:-1], jnp.float32))


def quantize_kv(x: Float[Array, "B K S C"], dtype: Any) -> ScaledKV:
    """Symmetric codes whose largest magnitude in each vector is the format's own (127 or 448).

    int8 codes round to nearest: no element is off by more than half its scale. A vector of zeros
    has scale 0. One that holds NaN or infinity has scale NaN, which reaches the logits: a bad row
    is found as it is without codes.
    """
    largest = _LARGEST[jnp.dtype(dtype)]
    vectors = x.astype(jnp.float32)
    is_finite = jnp.isfinite(vectors).all(axis=-1)  # asked by itself: a maximum may pass over NaN
    scales = jnp.where(is_finite, jnp.abs(vectors).max(axis=-1) / largest, jnp.nan)
    codes = vectors / jnp.where(scales == 0, 1.0, scales)[..., None]
    codes = jnp.clip(codes, -largest, largest)  # a subnormal scale is not that exact
    if dtype == jnp.int8:
        return ScaledKV(jnp.round(codes).astype(jnp.int8), scales)
    eight_bits = codes.astype(jnp.float8_e4m3fn)
    return ScaledKV(jax.lax.bitcast_convert_type(eight_bits, jnp.uint8), scales)
