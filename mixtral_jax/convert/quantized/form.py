"""What a quantized matrix looks like: its published parts, and those of its QTensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mixtral_jax.convert.safetensors_file import FLOATS, Tensor
from mixtral_jax.qtensor import NESTED_BLOCK, SCHEMES, Nested, QTensor, packed_size

# Every safetensors dtype that a part may have.
DTYPES: dict[str, np.dtype] = {
    **FLOATS,
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype(np.int32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}

# Published arrays of one matrix, by the name of the part (``qweight``).
Parts = Mapping[str, np.ndarray]
Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The parts of a QTensor, known before its data is read.

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

    def shapes(self, shape: tuple[int, ...], dtype: Any) -> QTensor:
        """A QTensor of ``jax.ShapeDtypeStruct`` that stands for a weight ``[..., O, I]``."""
        *stack, rows, inputs = shape
        grouped = (*stack, rows, self.num_groups)
        storage = jnp.dtype(SCHEMES[self.scheme].storage)
        scales: Any = jax.ShapeDtypeStruct(grouped, jnp.dtype(self.scales))
        if self.is_nested:
            blocks = math.ceil(rows * self.num_groups / NESTED_BLOCK)
            scales = Nested(
                jax.ShapeDtypeStruct(grouped, jnp.uint8),
                jax.ShapeDtypeStruct((*stack, blocks), jnp.float32),
                jax.ShapeDtypeStruct(tuple(stack), jnp.float32),
            )
        packed = (*stack, rows, packed_size(self.scheme, inputs))
        zeros = jax.ShapeDtypeStruct(grouped, jnp.uint8) if self.has_zeros else None
        order = jax.ShapeDtypeStruct((*stack, inputs), jnp.int32) if self.has_order else None
        return QTensor(
            jax.ShapeDtypeStruct(packed, storage), scales, self.scheme, dtype, zeros, order
        )


class Part(NamedTuple):
    """A published tensor as it must be: its shape, dtypes, and whether it may be absent."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    is_optional: bool = False


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

    def decode(self, parts: Parts, shape: tuple[int, int], form: Form, dtype: Any) -> QTensor:
        """The QTensor of a matrix, of numpy arrays in the parts of ``form``.

        Args:
            parts: all of them.
            shape: ``(O, I)``.
            form: what it must look like, as ``form`` told for the whole stack it belongs to.
            dtype: of the weight it stands for.

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
