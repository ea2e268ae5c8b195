"""The layouts of bitsandbytes: NF4 and FP4 with a serialized quant_state, and int8 with SCB.

4 bits, a linear ``[O, I]``: ``weight`` holds two codes in a byte, the first in the high half, of
the matrix in row-major order (as uint8 or as another dtype of the same bytes); ``absmax`` the
largest magnitude of every 64 codes, f32, or uint8 codes of a map with factors of their own (double
quantization, arXiv 2305.14314); ``quant_map`` the value of each code; the quant_state is JSON.

8 bits: ``weight`` int8 ``[O, I]``, ``SCB`` f32 ``[O]``, the largest magnitude of each row:
W = weight * SCB / 127.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from mixtral_jax.convert.quantized.form import DTYPES, Form, Part, Parts, compare
from mixtral_jax.convert.safetensors_file import Tensor
from mixtral_jax.qtensor import NESTED_BLOCK, SCHEMES, dynamic_map

_STATE = "quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 10_000
_ROUNDING = 1e-6  # relative


@dataclasses.dataclass(frozen=True)
class FourBit:
    """NF4 or FP4: each matrix says itself which, and whether its scales are quantized."""

    name: ClassVar[str] = "bitsandbytes 4-bit"
    endings: ClassVar[dict[str, str]] = {
        ".weight": "weight",
        **{
            f".weight.{part}": part
            for part in (
                "absmax",
                "quant_map",
                "nested_absmax",
                "nested_quant_map",
                f"{_STATE}nf4",
                f"{_STATE}fp4",
            )
        },
    }
    marks: ClassVar[frozenset[str]] = frozenset(endings.values()) - {"weight"}

    def problems(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
        """See ``Method``; the size of the blocks is in the quant_state, see ``form``."""
        states = [name for name in parts if name.startswith(_STATE)]
        if len(states) != 1:
            return [f"expected one {_STATE}nf4 or fp4, got {len(states)}"]
        (num_bytes,) = parts[states[0]].shape if len(parts[states[0]].shape) == 1 else (0,)
        if not 0 < num_bytes <= _MAX_STATE_BYTES:
            return [f"{states[0]}: expected up to {_MAX_STATE_BYTES} bytes in one dim"]
        found = []
        weight = parts.get("weight")
        if weight is not None:
            size = weight.stop - weight.start
            if weight.dtype not in DTYPES or size != math.prod(shape) // 2 or math.prod(shape) % 2:
                got = f"{weight.dtype} {list(weight.shape)}"
                found.append(
                    f"weight: expected {math.prod(shape)} codes in half the bytes, got {got}"
                )
        absmax = parts.get("absmax")
        is_nested = "nested_absmax" in parts or "nested_quant_map" in parts
        blocks = absmax.shape[0] if absmax is not None and len(absmax.shape) == 1 else 0
        nested = (math.ceil(blocks / NESTED_BLOCK),)
        wanted = {
            "weight": Part(weight.shape, (weight.dtype,)) if weight else Part((), ()),
            states[0]: Part((num_bytes,), ("U8",)),
            "absmax": Part((blocks,), ("U8",) if is_nested else ("F32",)),
            "quant_map": Part((16,), ("F32",)),
        }
        if is_nested:
            wanted["nested_absmax"] = Part(nested, ("F32",))
            wanted["nested_quant_map"] = Part((256,), ("F32",))
        return found + compare(parts, wanted)

    def form(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], read: Callable[[str], np.ndarray]
    ) -> Form:
        """See ``Method``."""
        name = next(name for name in parts if name.startswith(_STATE))
        state, scheme = _state(read(name)), name.removeprefix(_STATE)
        size = state.get("blocksize")
        expected = {"quant_type": scheme, "shape": list(shape)}
        for key, value in expected.items():
            if state.get(key) != value:
                raise ValueError(f"{name} {key}: expected {value!r}, got {state.get(key)!r}")
        if not isinstance(size, int) or isinstance(size, bool) or size < 2 or shape[1] % size:
            raise ValueError(
                f"{name} blocksize: expected a divisor of the {shape[1]} inputs, got {size!r}"
            )
        num_blocks = math.prod(shape) // size
        if parts["absmax"].shape != (num_blocks,):
            got = list(parts["absmax"].shape)
            raise ValueError(f"absmax: expected shape {[num_blocks]}, got {got}")
        _same_map("quant_map", read("quant_map"), np.asarray(SCHEMES[scheme].table, np.float32))
        is_nested = "nested_absmax" in parts
        if is_nested:
            if state.get("nested_blocksize") != NESTED_BLOCK:
                got = state.get("nested_blocksize")
                raise ValueError(f"{name} nested_blocksize: expected {NESTED_BLOCK}, got {got!r}")
            _offset(state)
            _same_map("nested_quant_map", read("nested_quant_map"), dynamic_map())
        return Form(scheme=scheme, num_groups=shape[1] // size, is_nested=is_nested)

    def decode(self, part: str, parts: Parts, shape: tuple[int, int], form: Form) -> np.ndarray:
        """See ``Method``."""
        if part == "codes":
            return parts["weight"].reshape(-1).view(np.uint8).reshape(shape[0], shape[1] // 2)
        if part in ("scales", "scale_codes"):
            return parts["absmax"].reshape(shape[0], form.num_groups)
        if part == "scale_absmax":
            return parts["nested_absmax"]
        assert part == "scale_offset"
        return _offset(_state(parts[f"{_STATE}{form.scheme}"]))


def _state(octets: np.ndarray) -> dict[str, Any]:
    try:
        found = json.loads(octets.tobytes().decode("utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("the quant_state is no JSON object")
    return found


def _offset(state: Mapping[str, Any]) -> np.ndarray:
    offset = state.get("nested_offset")
    if not isinstance(offset, float) or not math.isfinite(offset):
        raise ValueError(f"nested_offset: expected a number, got {offset!r}")
    return np.asarray(offset, np.float32)


def _same_map(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Refuses another map. Versions of torch round its values differently, in the last bits."""
    differs = ~(np.abs(found - expected) <= _ROUNDING * np.abs(expected))
    if differs.any():
        worst = int(np.argmax(differs))
        raise ValueError(f"{name}[{worst}]: expected {expected[worst]}, got {found[worst]}")


@dataclasses.dataclass(frozen=True)
class EightBit:
    """int8 with a scale per row."""

    name: ClassVar[str] = "bitsandbytes 8-bit"
    endings: ClassVar[dict[str, str]] = {
        ".weight": "weight",
        ".SCB": "SCB",
        ".weight_format": "weight_format",
    }
    marks: ClassVar[frozenset[str]] = frozenset(("SCB", "weight_format"))

    def problems(self, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> list[str]:
        """See ``Method``."""
        wanted = {
            "weight": Part(shape, ("I8",)),
            "SCB": Part(shape[:1], ("F32",)),
            "weight_format": Part((), ("U8",), is_optional=True),
        }
        return compare(parts, wanted)

    def form(
        self, parts: Mapping[str, Tensor], shape: tuple[int, int], read: Callable[[str], np.ndarray]
    ) -> Form:
        """See ``Method``."""
        if "weight_format" in parts and int(read("weight_format")):
            raise ValueError(f"weight_format: expected 0 (rows), got {int(read('weight_format'))}")
        return Form(scheme="int8", num_groups=1)

    def decode(self, part: str, parts: Parts, shape: tuple[int, int], form: Form) -> np.ndarray:
        """See ``Method``."""
        if part == "codes":
            return parts["weight"]
        assert part == "scales"
        return parts["SCB"][:, None] / np.float32(127)
