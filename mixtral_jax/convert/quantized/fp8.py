"""FP8 with a scale per matrix or per row, as compressed-tensors and AutoFP8 write it.

For a linear ``[O, I]``: ``weight`` float8 e4m3 ``[O, I]``, ``weight_scale`` ``[O, 1]``, ``[1]`` or
a scalar; W = weight * weight_scale. Scales of activations (``input_scale``) and of the cache are
for kernels that multiply in 8 bits; products are taken in 16 bits or more here, so they are left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np

from mixtral_jax.convert.quantized.form import Form, Part, Parts, compare
from mixtral_jax.convert.safetensors_file import FLOATS, Tensor


@dataclasses.dataclass(frozen=True)
class FP8:
    """float8 e4m3 with one scale per matrix or per row: each matrix tells by its shapes."""

    name: ClassVar[str] = "FP8"
    endings: ClassVar[dict[str, str]] = {
        f".{part}": part for part in ("weight", "weight_scale", "input_scale")
    }
    marks: ClassVar[frozenset[str]] = frozenset(("weight_scale", "input_scale"))

    def problems(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
        """See ``Method``."""
        rows = shape[0]
        per_row, per_matrix = (rows, 1), ((), (1,))
        scale = parts.get("weight_scale")
        is_scalar = scale is not None and scale.shape in per_matrix
        wanted = {
            "weight": Part(shape, ("F8_E4M3",)),
            "weight_scale": Part(scale.shape if scale and is_scalar else per_row, tuple(FLOATS)),
        }
        activation = parts.get("input_scale")
        if activation is not None:
            is_scalar = activation.shape in per_matrix
            wanted["input_scale"] = Part(activation.shape if is_scalar else (1,), tuple(FLOATS))
        return compare(parts, wanted)

    def form(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], read: Callable[[str], np.ndarray]
    ) -> Form:
        """See ``Method``."""
        return Form(scheme="fp8", num_groups=1, scales=FLOATS[parts["weight_scale"].dtype].name)

    def decode(self, part: str, parts: Parts, shape: tuple[int, int], form: Form) -> np.ndarray:
        """See ``Method``."""
        if part == "codes":
            return parts["weight"]
        assert part == "scales"
        scales = np.broadcast_to(parts["weight_scale"].reshape(-1, 1), (shape[0], 1))
        return np.ascontiguousarray(scales)
