"""The GPTQ layout: qweight, qzeros, scales, g_idx, as AutoGPTQ and GPTQModel write it.

For a linear ``[O, I]`` of B bits and G groups of inputs:

* ``qweight`` int32 ``[I * B / 32, O]``: each column is one stream of bits, the codes of an output
  in the order of the inputs, low bits first (so a code of 3 bits may lie across two words).
* ``qzeros`` int32 ``[G, O * B / 32]``: each row is such a stream over the outputs. The format
  ``gptq`` stores each zero point less one, ``gptq_v2`` as it is.
* ``scales`` float ``[G, O]``; ``g_idx`` int32 ``[I]``, the group of each input: in any order
  where columns were quantized in the order of their activations.

W[o, i] = scales[g_idx[i], o] * (code[o, i] - zero[g_idx[i], o]). See docs/formats.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import numpy as np

from mixtral_jax.convert.quantized.form import Form, Part, Parts, compare
from mixtral_jax.convert.safetensors_file import FLOATS, Tensor
from mixtral_jax.qtensor import SCHEMES, QTensor, pack, unpack

WORD_BITS = 32
_BLOCK_CODES = 1 << 22  # unpacked at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ:
    """GPTQ, as quantize_config.json describes it.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: inputs per group; None where all inputs are one.
        is_symmetric: every zero point is the middle of the range.
        has_order: g_idx may be in any order.
        is_v2: zero points are stored as they are, not less one.
    """

    bits: int
    group_size: int | None
    is_symmetric: bool
    has_order: bool
    is_v2: bool

    name: ClassVar[str] = "GPTQ"
    endings: ClassVar[dict[str, str]] = {
        f".{part}": part for part in ("qweight", "qzeros", "scales", "g_idx", "bias")
    }
    marks: ClassVar[frozenset[str]] = frozenset(("qweight", "qzeros", "scales", "g_idx"))

    def num_groups(self, num_inputs: int) -> int:
        """G; a single group need not be full."""
        return -(-num_inputs // (self.group_size or num_inputs))

    def problems(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
        """See ``Method``."""
        rows, inputs = shape
        if inputs * self.bits % WORD_BITS or rows * self.bits % WORD_BITS:
            return [f"{self.bits} bits: {rows} x {inputs} codes do not fill whole words"]
        groups = self.num_groups(inputs)
        if groups > 1 and inputs != groups * (self.group_size or 0):
            return [f"group_size {self.group_size} does not divide {inputs} inputs"]
        wanted = {
            "qweight": Part((inputs * self.bits // WORD_BITS, rows), ("I32",)),
            "qzeros": Part((groups, rows * self.bits // WORD_BITS), ("I32",)),
            "scales": Part((groups, rows), tuple(FLOATS)),
            "g_idx": Part((inputs,), ("I32",), is_optional=not self.has_order),
            "bias": Part((rows,), tuple(FLOATS), is_optional=True),
        }
        return compare(parts, wanted)

    def form(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], read: Callable[[str], np.ndarray]
    ) -> Form:
        """See ``Method``."""
        groups = self.num_groups(shape[1])
        order = order_of(read("g_idx"), groups) if "g_idx" in parts else None
        if order is not None and not self.has_order:
            raise ValueError("g_idx is not in order, but desc_act is false")
        if "bias" in parts and read("bias").any():
            raise ValueError("bias: expected zeros, Mixtral has no biases")
        return Form(
            scheme=f"gptq{self.bits}",
            num_groups=groups,
            scales=FLOATS[parts["scales"].dtype].name,
            has_zeros=not self.is_symmetric,
            has_order=order is not None,
        )

    def decode(self, part: str, parts: Parts, shape: tuple[int, int], form: Form) -> np.ndarray:
        """See ``Method``."""
        if part == "codes":
            order = order_of(parts["g_idx"], form.num_groups) if form.has_order else None
            return _codes(parts["qweight"], shape, form.scheme, order)
        if part == "order":
            order = order_of(parts["g_idx"], form.num_groups)
            return np.arange(shape[1], dtype=np.int32) if order is None else order
        if part == "zeros":
            return np.ascontiguousarray(self._zeros(parts, form).T)
        assert part == "scales"
        if not form.has_zeros:
            self._check_symmetric(self._zeros(parts, form), SCHEMES[form.scheme].zero)
        return np.ascontiguousarray(parts["scales"].T)

    def _zeros(self, parts: Parts, form: Form) -> np.ndarray:
        """The zero points; uint8 ``[G, O]``."""
        octets = np.ascontiguousarray(parts["qzeros"], "<i4").view(np.uint8)
        zeros = unpack(form.scheme, octets)
        return zeros if self.is_v2 else (zeros + np.uint8(1)) & np.uint8(2**self.bits - 1)

    def _check_symmetric(self, zeros: np.ndarray, middle: int) -> None:
        others = zeros[zeros != middle]
        if len(others):
            raise ValueError(
                f"qzeros: expected {middle} everywhere, as sym is true and the format is "
                f"{'gptq_v2' if self.is_v2 else 'gptq'}, got {int(others[0])}"
            )


def _codes(
    qweight: np.ndarray, shape: tuple[int, int], scheme: str, order: np.ndarray | None
) -> np.ndarray:
    """The codes row by row, in the order of their groups; uint8 ``[O, packed I]``."""
    codes = np.ascontiguousarray(qweight.T, "<i4").view(np.uint8)
    if order is not None:
        for rows in _blocks(shape):
            codes[rows] = pack(scheme, unpack(scheme, codes[rows])[:, order])
    return codes


def order_of(g_idx: np.ndarray, num_groups: int) -> np.ndarray | None:
    """The inputs sorted by group, each group in the order of its inputs; None if they are.

    Args:
        g_idx: int32 ``[I]``.
        num_groups: G.

    Returns:
        int32 ``[I]``.

    Raises:
        ValueError: if the groups are not G of one size.
    """
    size = len(g_idx) // num_groups
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if not np.array_equal(g_idx[order], np.arange(len(g_idx)) // size):
        raise ValueError(f"g_idx: expected {num_groups} groups of {size} inputs")
    return None if np.array_equal(order, np.arange(len(g_idx))) else order


def _blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """Rows at a time, so many that their codes take little memory."""
    step = max(1, _BLOCK_CODES // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def encode(q: QTensor, *, is_v2: bool = False) -> dict[str, np.ndarray]:
    """The published parts of one matrix: the inverse of ``GPTQ.decode``.

    Args:
        q: of a ``gptq`` scheme (``int4`` is ``gptq4``), numpy or JAX arrays ``[O, I]``.
        is_v2: store zero points as they are (``checkpoint_format`` gptq_v2).

    Returns:
        ``qweight``, ``qzeros``, ``scales`` (rounded to float16) and ``g_idx``.

    Raises:
        ValueError: if the layout cannot hold the matrix: another scheme, sizes that do not fill
            words, scales beyond float16, or zero points of zero without ``is_v2``.
    """
    row = SCHEMES[q.scheme]
    if row.table is not None or row.is_signed:
        raise ValueError(f"the GPTQ layout holds gptq and int4 schemes, not {q.scheme}")
    rows, inputs = q.shape
    if inputs * row.bits % WORD_BITS or rows * row.bits % WORD_BITS:
        raise ValueError(f"{row.bits} bits: {rows} x {inputs} codes do not fill whole words")
    groups = q.scales.shape[-1]
    with np.errstate(over="ignore"):
        halves = np.asarray(q.scales).astype(np.float16)
    if not np.isfinite(halves).all():
        raise ValueError("a scale is too large for the float16 of the GPTQ layout")
    codes = np.asarray(q.codes)
    g_idx = np.arange(inputs, dtype=np.int32) // (inputs // groups)
    if q.order is not None:
        order = np.asarray(q.order)
        places = np.argsort(order)
        codes = codes.copy()
        for block in _blocks((rows, inputs)):
            codes[block] = pack(q.scheme, unpack(q.scheme, codes[block])[:, places])
        g_idx = g_idx[places]
    zeros = np.full((rows, groups), row.zero, np.uint8) if q.zeros is None else np.asarray(q.zeros)
    if not is_v2:
        if not zeros.all():
            raise ValueError("a zero point of 0 has no place in the format gptq; write gptq_v2")
        zeros = zeros - np.uint8(1)
    packed = pack(q.scheme, np.ascontiguousarray(zeros.T))
    return {
        "qweight": np.ascontiguousarray(codes.view("<i4").T),
        "qzeros": packed.view("<i4"),
        "scales": np.ascontiguousarray(halves.T),
        "g_idx": g_idx,
    }
