"""Packed codes to numbers, elementwise: what every fused dequantize-multiply does to a tile."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from mixtral_jax.qtensor import SCHEMES, QTensor

_FP8_NAN = 0x7F


def is_widened(w: object) -> bool:
    """Whether a weight can be widened byte by byte: codes lie within bytes, and bytes in groups."""
    if not isinstance(w, QTensor):
        return False
    row = SCHEMES[w.scheme]
    is_in_bytes = not row.is_coded and 8 % row.bits == 0
    return is_in_bytes and w.codes.shape[-1] % w.scales.shape[-1] == 0


def codes_per_byte(w: QTensor) -> int:
    """How many inputs an element of the codes holds."""
    return w.shape[-1] // w.codes.shape[-1]


def split_inputs(x: Num[Array, "*N I"], w: QTensor) -> list[Num[Array, "*N B"]]:
    """Rows' inputs as a weight's codes lie in bytes: one array for each place in a byte."""
    parts = codes_per_byte(w)
    return [x[..., p::parts] for p in range(parts)]


def _look_up(codes: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """Entries of a table of 16 by selection: a CPU's gather takes longer than 15 of them."""
    values: list = [jnp.float32(value) for value in table]
    for bit in range(4):
        is_set = (codes & (1 << bit)) != 0
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, high, low) for low, high in pairs]
    return values[0]


def _fp8_values(codes: jax.Array) -> jax.Array:
    """e4m3 from its bits, moved to where f16 has them: the exponent's bias is 8 less, 2^8."""
    wide = codes.astype(jnp.uint16)
    magnitude = wide & _FP8_NAN
    half = jax.lax.bitcast_convert_type(((wide & 0x80) << 8) | (magnitude << 7), jnp.float16)
    value = half.astype(jnp.float32) * 256
    return jnp.where(magnitude == _FP8_NAN, jnp.nan, value)


def code_values(scheme: str, codes: jax.Array, zero: jax.Array | float) -> list[jax.Array]:
    """What each code in the elements of ``codes`` stands for before its scale; f32.

    Args:
        scheme: one whose codes lie within bytes.
        codes: any tile of a QTensor's codes; those of fp8 also as their bits in uint8.
        zero: of codes that are numbers.
    """
    row = SCHEMES[scheme]
    if scheme == "fp8" and codes.dtype == jnp.uint8:
        return [_fp8_values(codes)]
    if not row.is_packed:
        return [codes.astype(jnp.float32)]
    shifts = range(0, 8, row.bits)
    mask = 2**row.bits - 1
    each = [(codes >> shift) & mask for shift in (shifts[::-1] if row.high_first else shifts)]
    if row.table is not None:
        return [_look_up(one, row.table) for one in each]
    return [one.astype(jnp.float32) - zero for one in each]
