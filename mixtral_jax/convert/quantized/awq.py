"""The AWQ layout for GEMM kernels: 4 bits, packed along the outputs, as AutoAWQ writes it.

For a linear ``[O, I]`` with G groups of inputs: ``qweight`` int32 ``[I, O / 8]`` and ``qzeros``
int32 ``[G, O / 8]``; the k-th nibble (low first) of a word holds output ``8 * word + ORDER[k]``.
``scales`` float ``[G, O]``. W[o, i] = scales[g, o] * (code[i, o] - zero[g, o]) with g = i // size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from mixtral_jax.convert.quantized.form import Form, Part, Parts, compare
from mixtral_jax.convert.safetensors_file import FLOATS, Tensor
from mixtral_jax.qtensor import pack, packed_size

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_SCHEME = "gptq4"
_BLOCK_WORDS = 1 << 19  # unpacked at a time, to eight codes each


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ:
    """AWQ, as its configuration describes it: ``group_size`` inputs per group, None for all."""

    group_size: int | None

    name: ClassVar[str] = "AWQ"
    endings: ClassVar[dict[str, str]] = {
        f".{part}": part for part in ("qweight", "qzeros", "scales", "bias")
    }
    marks: ClassVar[frozenset[str]] = frozenset(("qweight", "qzeros", "scales"))

    def problems(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
        """See ``Method``."""
        rows, inputs = shape
        size = self.group_size or inputs
        if rows % 8 or inputs % 2 or inputs % size:
            return [f"{rows} x {inputs} codes do not fill whole words and groups of {size}"]
        wanted = {
            "qweight": Part((inputs, rows // 8), ("I32",)),
            "qzeros": Part((inputs // size, rows // 8), ("I32",)),
            "scales": Part((inputs // size, rows), tuple(FLOATS)),
            "bias": Part((rows,), tuple(FLOATS), is_optional=True),
        }
        return compare(parts, wanted)

    def form(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], read: Callable[[str], np.ndarray]
    ) -> Form:
        """See ``Method``."""
        if "bias" in parts and read("bias").any():
            raise ValueError("bias: expected zeros, Mixtral has no biases")
        return Form(
            scheme=_SCHEME,
            num_groups=shape[1] // (self.group_size or shape[1]),
            scales=FLOATS[parts["scales"].dtype].name,
            has_zeros=True,
        )

    def decode(self, part: str, parts: Parts, shape: tuple[int, int], form: Form) -> np.ndarray:
        """See ``Method``."""
        if part == "codes":
            return _codes(parts["qweight"], shape)
        if part == "zeros":
            return _outputs(parts["qzeros"])
        assert part == "scales"
        return np.ascontiguousarray(parts["scales"].T)


def _codes(words: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rows, inputs = shape
    codes = np.empty((rows, packed_size(_SCHEME, inputs)), np.uint8)
    step = max(1, _BLOCK_WORDS // inputs)
    for start in range(0, words.shape[1], step):
        block = _outputs(words[:, start : start + step])
        codes[8 * start : 8 * start + len(block)] = pack(_SCHEME, block)
    return codes


def _outputs(words: np.ndarray) -> np.ndarray:
    """The codes of words ``[n, O / 8]``; uint8 ``[O, n]``."""
    columns = np.ascontiguousarray(words.T).view(np.uint32)
    codes = np.empty((len(columns), 8, columns.shape[1]), np.uint8)
    for nibble, output in enumerate(ORDER):
        codes[:, output] = (columns >> np.uint32(4 * nibble)) & np.uint32(15)
    return codes.reshape(-1, columns.shape[1])
