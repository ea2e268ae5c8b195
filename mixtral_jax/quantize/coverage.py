"""What is quantized and what is not, by groups of weights, counted from the weights themselves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mixtral_jax import ternary_code
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.model.transformer import LeafSpec
from mixtral_jax.qtensor import SCHEMES, inputs_of
from mixtral_jax.weights import Adapted, ExpertSlots, QTensor

# The group of a weight by the axes of its dims: (an axis it has, the group), the first that fits.
_GROUPS = (
    ("expert", "experts"),
    ("heads", "attention"),
    ("kv_heads", "attention"),
    ("router_expert", "router"),
    ("norm", "norms"),
    ("vocab", "embeddings and head"),
)


class Row(NamedTuple):
    """One group in one scheme (or dtype, where it is not quantized)."""

    group: str
    scheme: str
    parameters: int
    bytes: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales and all."""
        return 8 * self.bytes / self.parameters


@dataclasses.dataclass(frozen=True)
class Coded:
    """How much of the room of coded rows is used; what is not, is held all the same.

    Attributes:
        parameters: in coded rows.
        bytes: of codewords that stand for something.
        held: bytes of all codewords.
    """

    parameters: int = 0
    bytes: int = 0
    held: int = 0

    def __add__(self, other: Coded) -> Coded:
        return Coded(
            self.parameters + other.parameters, self.bytes + other.bytes, self.held + other.held
        )

    def __str__(self):
        rates = [f"{8 * size / self.parameters:.3f}" for size in (self.bytes, self.held)]
        told = f"codewords: {self.bytes:,} of {self.held:,} bytes used"
        return f"{told}, {rates[0]} of {rates[1]} bits per weight"


def coded(scheme: str, codes: np.ndarray) -> Coded:
    """Counts the codewords of coded rows ``[..., size]``."""
    parameters = math.prod(codes.shape[:-1]) * inputs_of(scheme, codes.shape[-1])
    return Coded(parameters, ternary_code.used(codes) * codes.itemsize, codes.nbytes)


def group_of(spec: LeafSpec) -> str:
    """The group of a weight."""
    return next(group for axis, group in _GROUPS if axis in spec.axes)


def _kind(w: Any) -> str:
    if isinstance(w, ExpertSlots):
        kinds = {_kind(slot) for slot in w.slots}
        return kinds.pop() if len(kinds) == 1 else " and ".join(sorted(kinds))
    if isinstance(w, Adapted):
        return _kind(w.base)
    return w.scheme if isinstance(w, QTensor) else np.dtype(w.dtype).name


def _bytes(w: Any) -> int:
    """Of a weight of any kind, without the factors of an adapter."""
    if isinstance(w, ExpertSlots):
        return sum(map(_bytes, w.slots))
    arrays = jax.tree.leaves(w.base if isinstance(w, Adapted) else w)
    return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)


def coverage(weights: Mapping[str, Any], specs: Mapping[str, LeafSpec]) -> list[Row]:
    """Counts weights by group and scheme.

    Args:
        weights: arrays or QTensors of them, or of their shapes, by path.
        specs: of the weights.
    """
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for path, w in weights.items():
        key = group_of(specs[path]), _kind(w)
        parameters, size = totals.get(key, (0, 0))
        totals[key] = parameters + math.prod(specs[path].shape), size + _bytes(w)
    order = list(dict.fromkeys(group for _, group in _GROUPS))
    rows = [Row(*key, *counts) for key, counts in totals.items()]
    return sorted(rows, key=lambda row: (order.index(row.group), row.scheme))


def check_experts(
    weights: Mapping[str, Any], specs: Mapping[str, LeafSpec], *, bits: int | None = None
) -> None:
    """Refuses experts that are not in the bits that were asked for.

    Args:
        weights: as for ``coverage``.
        specs: of the weights.
        bits: at most so many for a code; None where only some weights being quantized says that
            all experts should be.

    Raises:
        MixtralError: exit code 65 naming the first such leaf and the share that is in order.
    """
    experts = [path for path in weights if group_of(specs[path]) == "experts"]
    wrong = [path for path in experts if not _is_in_bits(weights[path], bits)]
    if not wrong:
        return
    count = sum(math.prod(specs[path].shape) for path in experts)
    bad = sum(math.prod(specs[path].shape) for path in wrong)
    asked = "few bits" if bits is None else f"at most {bits} bits"
    raise MixtralError(
        f"{wrong[0]} is in {_kind(weights[wrong[0]])}: experts in {asked}",
        expected="100 %",
        got=f"{100 * (count - bad) / count:.1f} %",
        fix="quantize the original checkpoint again",
        code=BAD_DATA,
    )


def _is_in_bits(w: Any, bits: int | None) -> bool:
    if isinstance(w, ExpertSlots):
        return all(_is_in_bits(slot, bits) for slot in w.slots)
    if isinstance(w, Adapted):
        return _is_in_bits(w.base, bits)
    return isinstance(w, QTensor) and (bits is None or SCHEMES[w.scheme].bits <= bits)


def lines(rows: list[Row]) -> Iterator[str]:
    """The table as text, with a total."""
    cells = [("group", "parameters", "bytes", "bits per weight", "scheme")]
    cells += [
        (row.group, f"{row.parameters:,}", f"{row.bytes:,}", f"{row.bits:.3f}", row.scheme)
        for row in rows
    ]
    total = Row("total", "", sum(row.parameters for row in rows), sum(row.bytes for row in rows))
    cells.append(("total", f"{total.parameters:,}", f"{total.bytes:,}", f"{total.bits:.3f}", ""))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    for group, *numbers, scheme in cells:
        right = [cell.rjust(width) for cell, width in zip(numbers, widths[1:4], strict=True)]
        yield "  ".join([group.ljust(widths[0]), *right, scheme]).rstrip()
