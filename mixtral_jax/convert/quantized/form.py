"""What a quantized matrix looks like: its published parts, and those of its QTensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from mixtral_jax.convert.safetensors_file import FLOATS, Tensor

# Every safetensors dtype that a part may have.
DTYPES: dict[str, np.dtype] = {
    **FLOATS,
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    # Of bytes that stand for codes, whatever they are called.
    "F64": np.dtype(np.float64),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}

# Published arrays of one matrix, by the name of the part (``qweight``).
Parts = Mapping[str, np.ndarray]
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """What a QTensor will be, known before its data is read.

    Attributes:
        scheme: a key of ``SCHEMES``.
        num_groups: G.
        scales: dtype name; of nested scales ``float32``.
        is_nested: the scales are quantized themselves.
        has_zeros: there are zero points.
        has_order: there is an order of the inputs.
    """

    scheme: str
    num_groups: int
    scales: str = "float32"
    is_nested: bool = False
    has_zeros: bool = False
    has_order: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that it has: keys of ``parts.PARTS``."""
        nested = ("scale_codes", "scale_absmax", "scale_offset")
        scales = nested if self.is_nested else ("scales",)
        zeros = ("zeros",) if self.has_zeros else ()
        return ("codes", *scales, *zeros, *(("order",) if self.has_order else ()))


class Part(NamedTuple):
    """A published tensor as it must be: its shape, dtypes, and whether it may be absent."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False


@runtime_checkable
class Method(Protocol):
    """A way of publishing quantized matrices, as a checkpoint's configuration has it.

    A method never sees a whole checkpoint: it is asked about one matrix at a time.

    Attributes:
        name: what people call it.
        endings: the end of a tensor's name, in place of ``.weight`` -> its part.
        marks: the parts by which a quantized matrix is told from a plain one.
    """

    name: ClassVar[str]
    endings: ClassVar[dict[str, str]]
    marks: ClassVar[frozenset[str]]

    def problems(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
        """What is wrong with the parts of a matrix ``[O, I]``, by their headers alone."""
        ...

    def form(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], read: Callable[[str], np.ndarray]
    ) -> Form:
        """The form of a sound matrix.

        Args:
            parts: without ``problems``.
            shape: ``(O, I)``.
            read: gives a part whole; asked for small ones only.

        Raises:
            ValueError: for content that no matrix can have.
        """
        ...

    def decode(self, part: str, parts: Parts, shape: tuple[int, int], form: Form) -> np.ndarray:
        """One part of the QTensor of a matrix.

        Args:
            part: one of ``form.parts``.
            parts: the published ones; each is read when it is first asked for.
            shape: ``(O, I)``.
            form: what it must look like, as ``form`` told for the whole stack it belongs to.

        Raises:
            ValueError: for content that no matrix can have.
        """
        ...


def compare(parts: Mapping[str, Tensor], wanted: Mapping[str, Part]) -> list[str]:
    """Every difference between the headers of a matrix and what they must be."""
    found = [
        f"missing {name}"
        for name, part in wanted.items()
        if name not in parts and not part.is_optional
    ]
    found += [f"extra {name}" for name in parts.keys() - wanted.keys()]
    for name in parts.keys() & wanted.keys():
        tensor, part = parts[name], wanted[name]
        if tensor.shape != part.shape:
            found.append(f"{name}: expected shape {list(part.shape)}, got {list(tensor.shape)}")
        if tensor.dtype not in part.dtypes:
            found.append(f"{name}: expected dtype {' or '.join(part.dtypes)}, got {tensor.dtype}")
    return found
