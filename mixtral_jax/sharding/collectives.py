"""Collectives of a compiled program, read from its HLO: what travels, and how much."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

KINDS = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce",
         "collective-permute")  # fmt: skip
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_OP = re.compile(
    rf"= (?P<type>\(?[^=]*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>[^\n]*)"
)
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_GROUPS = r"\{\{([\d,]+(?:\},\{[\d,]+)*)\}\}"
_LISTED = re.compile("replica_groups=" + _GROUPS)
_PAIRS = re.compile("source_target_pairs=" + _GROUPS)
_ORDER = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # the numbers from 0 on, in this shape, transposed
_IOTA = re.compile(rf"replica_groups=\[(\d+),(\d+)\]<={_ORDER}")
# mesh[axes], how devices are ordered in it (or not), {the axes of a group}
_NAMED = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_ORDER}\))? ?\{{([^}}]*)\}}"
)
_COMMENT = re.compile(r"/\*.*?\*/")


class Collective(NamedTuple):
    """One operation of the program, as one device sees it.

    Attributes:
        kind: one of ``KINDS``.
        bytes: of its result on this device (of its operand, for reduce-scatter).
        group_size: devices that take part together; 2 in a collective-permute.
        span: devices from the first to the last of a group, both counted, as the mesh numbers them.
    """

    kind: str
    bytes: int
    group_size: int
    span: int

    @property
    def wire_bytes(self) -> float:
        """Bytes that this device sends, by the usual ring or direct algorithms."""
        if self.kind == "collective-permute":
            return self.bytes
        share = (self.group_size - 1) / self.group_size
        return self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def read_collectives(hlo: str) -> list[Collective]:
    """All collectives in the text of a compiled module, those of both branches of a conditional.

    Raises:
        ValueError: if the text has a group of devices in a form that is not known here.
    """
    found = []
    for match in _OP.finditer(_COMMENT.sub("", hlo)):
        groups = _groups(match["rest"])
        span = int((groups.max(1) - groups.min(1)).max()) + 1
        size = groups.shape[1]
        found.append(Collective(match["kind"], _num_bytes(match, size), size, span))
    return found


def _num_bytes(match: re.Match[str], group_size: int) -> int:
    arrays = _ARRAY.findall(match["type"])
    if match["start"]:  # (operands, results)
        arrays = arrays[len(arrays) // 2 :]
    total = sum(_size(*array) for array in arrays)
    return total * (group_size if match["kind"] == "reduce-scatter" else 1)


def _size(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def _groups(rest: str) -> np.ndarray:
    """Numbers of the devices that take part together, a row for each group."""
    listed = _LISTED.search(rest) or _PAIRS.search(rest)
    if listed:
        return np.array([_numbers(group) for group in listed[1].split("},{")])
    iota = _IOTA.search(rest)
    if iota:
        return _ordered(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    named = _NAMED.search(rest)
    if named is None:  # the form of a group changes with XLA; a size of one would hide it
        raise ValueError(f"no known form of replica_groups in: {rest}")
    axes, shape, order, over = named.groups()
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    names, inside = list(sizes), re.findall(r"'(\w+)'", over)
    count = math.prod(sizes.values())
    devices = _ordered(shape or str(count), order).reshape(*sizes.values())
    last = range(len(names) - len(inside), len(names))
    devices = np.moveaxis(devices, [names.index(axis) for axis in inside], last)
    return devices.reshape(-1, math.prod(sizes[axis] for axis in inside))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _ordered(shape: str, order: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return (devices if order is None else devices.transpose(_numbers(order))).reshape(-1)


def totals(collectives: Iterable[Collective]) -> Counter[str]:
    """Bytes by kind, of operations between at least two devices."""
    found: Counter[str] = Counter()
    for each in collectives:
        if each.group_size > 1:
            found[each.kind] += each.bytes
    return found
