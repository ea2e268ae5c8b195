"""QTensor: a quantized matrix, or stack of them, in packed codes and the scales of its groups.

A group is a run of consecutive inputs of one output row. What a code stands for, by scheme:

====== ============================================================ =========================
scheme codes                                                        value before the scale
====== ============================================================ =========================
int8   int8 ``[..., O, I]``                                         the code
fp8    float8 e4m3 ``[..., O, I]``                                  the code
int4   two in a byte, low half first                                code - zero (8 unless said)
nf4    two in a byte, high half first                               ``NF4[code]``
fp4    two in a byte, high half first                               ``FP4[code]``
gptqB  B bits each, from the low bits of the first byte on          code - zero (2^(B-1))
qmoe   three codewords of 16 bits per 64 inputs (ternary_code.py)   -1, 0 or 1
====== ============================================================ =========================

NF4 is the NormalFloat of QLoRA (Dettmers et al. 2023, arXiv 2305.14314, appendix E), FP4 the table
of bitsandbytes; both scale by the largest magnitude of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax import ternary_code

# What stands for an array where a tree of shapes, specs or shardings has the same form, as well.
Part = Any

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in _TWELFTHS)
NESTED_BLOCK = 256  # scales under one factor


@functools.cache
def dynamic_map(*, is_signed: bool = True) -> np.ndarray:
    """The 256 values, ascending, of an 8-bit code with a dynamic exponent; float32.

    "Dynamic tree quantization" of Dettmers et al. 2021 (arXiv 2110.02861): with n leading zeros
    the remaining bits divide [0.1, 1) evenly, times 10^-n; then zero and one. Without a sign its
    bit divides further.
    """
    values = [0.0, 1.0]
    for bits in range(7):
        edges = _even_steps(2 ** (bits if is_signed else bits + 1) + 1)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        scaled = np.float32(10.0 ** (bits - 6)) * middles
        values += [*scaled, *-scaled] if is_signed else [*scaled]
    return np.sort(np.asarray(values, np.float32))


def _even_steps(count: int) -> np.ndarray:
    """[0.1, 1] in even steps as torch.linspace rounds them: from both ends, with a float32 step."""
    low, high = np.float32(0.1), np.float32(1)
    step = float((high - low) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, low + step * i, high - step * (count - 1 - i)).astype(
        np.float32
    )


@dataclasses.dataclass(frozen=True)
class Nested:
    """Scales that are quantized themselves (double quantization, arXiv 2305.14314).

    Attributes:
        codes: uint8 ``[..., O, G]``, into ``dynamic_map``.
        absmax: float32 ``[..., ceil(O * G / 256)]``, one factor per 256 codes of a matrix in
            row-major order.
        offset: float32 ``[...]``, added to every scale of a matrix.
    """

    codes: Part
    absmax: Part
    offset: Part

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the scales that this stands for."""
        return tuple(self.codes.shape)

    def values(self) -> jax.Array:
        """The scales; float32 ``[..., O, G]``."""
        *stack, outputs, groups = self.codes.shape
        size = outputs * groups
        flat = jnp.asarray(dynamic_map())[jnp.asarray(self.codes).reshape(*stack, size)]
        factors = jnp.repeat(jnp.asarray(self.absmax), NESTED_BLOCK, axis=-1)[..., :size]
        offset = jnp.asarray(self.offset)[..., None]
        return (flat * factors + offset).reshape(self.codes.shape)


jax.tree_util.register_dataclass(Nested, data_fields=("codes", "absmax", "offset"), meta_fields=())


class Scheme(NamedTuple):
    """How inputs are packed and what a code stands for.

    Attributes:
        bits: of a code; at most so many per input where inputs share codewords.
        storage: dtype name of ``codes``.
        high_first: the first of two codes is in the high half of its byte.
        table: the value of each code; None where the code is a number.
        is_signed: codes are numbers around zero, so there are no zero points.
        room: (inputs, codewords) of a coded row, a multiple of them; None where rows are not coded.
    """

    bits: int
    storage: str = "uint8"
    high_first: bool = False
    table: tuple[float, ...] | None = None
    is_signed: bool = False
    room: tuple[int, int] | None = None

    @property
    def is_coded(self) -> bool:
        """Whether rows are coded as a whole, so that none can be cut."""
        return self.room is not None

    @property
    def is_packed(self) -> bool:
        """Whether bytes hold codes, rather than each element of ``codes`` being one."""
        return self.storage == "uint8" or self.is_coded

    @property
    def zero(self) -> int:
        """The zero point where none is given."""
        return 0 if self.is_signed or self.table is not None else 2 ** (self.bits - 1)

    @property
    def unit(self) -> tuple[int, int]:
        """(codes, elements): so many consecutive codes fill whole elements, and no fewer do."""
        if self.room is not None:
            return self.room
        ways = math.lcm(self.bits, 8)
        return ways // self.bits, ways // 8


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(8, "int8", is_signed=True),
    "fp8": Scheme(8, "float8_e4m3fn", is_signed=True),
    "int4": Scheme(4),
    "nf4": Scheme(4, high_first=True, table=NF4),
    "fp4": Scheme(4, high_first=True, table=FP4),
    **{f"gptq{bits}": Scheme(bits) for bits in (2, 3, 4, 8)},
    "qmoe": Scheme(1, "uint16", is_signed=True, room=(64, 3)),
}


def packed_size(scheme: str, num_inputs: int) -> int:
    """Elements of ``codes`` along the inputs.

    Raises:
        ValueError: if the inputs do not fill whole bytes.
    """
    row = SCHEMES[scheme]
    codes, num_bytes = row.unit
    if num_inputs % codes:
        raise ValueError(f"{scheme} packs multiples of {codes} inputs, got {num_inputs}")
    return num_inputs // codes * num_bytes if row.is_packed else num_inputs


def inputs_of(scheme: str, size: int) -> int:
    """Inputs that so many elements of ``codes`` hold: the inverse of ``packed_size``."""
    row = SCHEMES[scheme]
    codes, elements = row.unit
    return size // elements * codes if row.is_packed else size


def _numpy_of(x: Any) -> ModuleType:
    return np if isinstance(x, np.ndarray) else jnp


def pack(scheme: str, codes: Any) -> Any:
    """Packs codes along the last dim; numpy in, numpy out, as with JAX.

    Args:
        scheme: a key of ``SCHEMES``.
        codes: ``[..., I]`` of any integer dtype (any float for fp8), in the range of the scheme.
            For qmoe numpy's, and no more that are not zero than a row has room for.

    Returns:
        ``[..., packed_size(scheme, I)]`` in the dtype that the scheme stores.
    """
    row, xp = SCHEMES[scheme], _numpy_of(codes)
    size = packed_size(scheme, codes.shape[-1])
    if row.is_coded:
        words = ternary_code.encode(codes.reshape(-1, codes.shape[-1]), size)
        return words.reshape(*codes.shape[:-1], size)
    if not row.is_packed or row.bits == 8:
        return codes.astype(jnp.dtype(row.storage))
    num_codes, num_bytes = row.unit
    words = codes.reshape(*codes.shape[:-1], -1, num_codes).astype(xp.uint32)
    places = xp.arange(num_codes, dtype=xp.uint32) * row.bits
    places = places[::-1] if row.high_first else places
    words = (words << places).sum(axis=-1, dtype=xp.uint32)
    octets = words[..., None] >> (xp.arange(num_bytes, dtype=xp.uint32) * 8)
    return (octets & 0xFF).astype(xp.uint8).reshape(*codes.shape[:-1], -1)


def unpack(scheme: str, packed: Any) -> Any:
    """The codes of packed bytes, ``[..., I]``: the inverse of ``pack``, in the stored dtype."""
    row, xp = SCHEMES[scheme], _numpy_of(packed)
    if row.is_coded:
        inputs = inputs_of(scheme, packed.shape[-1])
        return (ternary_code.decode if xp is np else ternary_code.decode_on_device)(packed, inputs)
    if not row.is_packed or row.bits == 8:
        return packed
    num_codes, num_bytes = row.unit
    if num_bytes == 1:
        words = packed[..., None]
        places = xp.arange(num_codes, dtype=xp.uint8) * xp.uint8(row.bits)
    else:
        octets = packed.reshape(*packed.shape[:-1], -1, num_bytes).astype(xp.uint32)
        octets = octets << (xp.arange(num_bytes, dtype=xp.uint32) * 8)
        words = octets.sum(axis=-1, dtype=xp.uint32)[..., None]
        places = xp.arange(num_codes, dtype=xp.uint32) * row.bits
    places = places[::-1] if row.high_first else places
    codes = (words >> places) & (2**row.bits - 1)
    return codes.astype(xp.uint8).reshape(*packed.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized matrix or stack of matrices; it stands for an array ``[..., O, I]``.

    Every part has the leading dims of the stack, so parts of a stack are stacks of parts.

    Attributes:
        codes: ``[..., O, packed_size(scheme, I)]``, packed along the inputs.
        scales: ``[..., O, G]`` in a float dtype, or ``Nested``; group g holds columns
            ``g * I / G`` and on.
        scheme: a key of ``SCHEMES``.
        dtype: the dtype of the weight that this stands for.
        zeros: uint8 ``[..., O, G]``, or None for the middle of the range.
        order: int32 ``[..., I]``: packed column j holds the weight of input ``order[j]``; None
            where columns lie in the order of the inputs. Products take ``x[..., order]``.
    """

    codes: Part
    scales: Part
    scheme: str
    dtype: Any
    zeros: Part = None
    order: Part = None

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme: expected one of {sorted(SCHEMES)}, got {self.scheme!r}")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for; of a device's part inside shard_map."""
        *rows, size = self.codes.shape
        return (*rows, inputs_of(self.scheme, size))

    @property
    def ndim(self) -> int:
        """Number of dims of the weight that this stands for."""
        return len(self.codes.shape)

    def __getitem__(self, index: object) -> QTensor:
        if index is not Ellipsis:
            raise TypeError(f"a weight kind answers [...] only, not [{index!r}]")
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in jax.tree.leaves(self))

    def scale_values(self) -> jax.Array:
        """The scales; float32 ``[..., O, G]``."""
        if isinstance(self.scales, Nested):
            return self.scales.values()
        return jnp.asarray(self.scales).astype(jnp.float32)

    def dequantize(self) -> jax.Array:
        """The weight as an array of ``dtype`` and ``shape``, its columns in the order of inputs.

        Computed in float32 and then cast.
        """
        row = SCHEMES[self.scheme]
        codes = unpack(self.scheme, jnp.asarray(self.codes))
        if row.table is not None:
            values = jnp.asarray(row.table, jnp.float32)[codes]
        else:
            values = codes.astype(jnp.float32)
        grouped = values.reshape(*values.shape[:-1], self.scales.shape[-1], -1)
        if row.zero:
            zeros = row.zero if self.zeros is None else self.zeros[..., None].astype(jnp.float32)
            grouped = grouped - zeros
        values = (grouped * self.scale_values()[..., None]).reshape(values.shape)
        if self.order is not None:
            places = jnp.argsort(self.order, axis=-1)[..., None, :]
            values = jnp.take_along_axis(values, places, axis=-1)
        return values.astype(self.dtype)


jax.tree_util.register_dataclass(
    QTensor,
    data_fields=("codes", "scales", "zeros", "order"),
    meta_fields=("scheme", "dtype"),
)
