"""Collectives of a compiled program, read from its HLO: what travels, and how much."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce",
         "collective-permute")  # fmt: skip
_BITS = {"pred": 8, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_OP = re.compile(
    rf"= (?P<type>\(?[^=]*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\((?P<rest>[^\n]*)"
)
_ARRAY = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
# mesh[axes], how devices are ordered in it (or not), {the axes of a group}
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\)\)?)? ?\{([^}]*)\}")
_COMMENT = re.compile(r"/\*.*?\*/")


class Collective(NamedTuple):
    """One operation of the program, as one device sees it.

    Attributes:
        kind: one of ``KINDS``.
        bytes: of its result on this device (of its operand, for reduce-scatter).
        group_size: devices that take part together; 2 in a collective-permute.
    """

    kind: str
    bytes: int
    group_size: int

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
    return [
        Collective(match["kind"], _num_bytes(match), _group_size(match["rest"]))
        for match in _OP.finditer(_COMMENT.sub("", hlo))
    ]


def _num_bytes(match: re.Match[str]) -> int:
    arrays = _ARRAY.findall(match["type"])
    if match["start"]:  # (operands, results)
        arrays = arrays[len(arrays) // 2 :]
    total = sum(_size(*array) for array in arrays)
    if match["kind"] == "reduce-scatter":
        total *= _group_size(match["rest"])
    return total


def _size(dtype: str, dims: str) -> int:
    bits = _BITS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
    return math.prod(int(n) for n in dims.split(",") if n) * bits // 8


def _group_size(rest: str) -> int:
    if "source_target_pairs=" in rest:
        return 2
    listed, iota = _LISTED.search(rest), _IOTA.search(rest)
    if listed:
        return len(listed[1].split(","))
    if iota:
        return int(iota[2])
    named = _NAMED.search(rest)
    if named is None:  # the form of a group changes with XLA; a size of one would hide it
        raise ValueError(f"no known form of replica_groups in: {rest}")
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))


def totals(collectives: Iterable[Collective]) -> Counter[str]:
    """Bytes by kind, of operations between at least two devices."""
    found: Counter[str] = Counter()
    for each in collectives:
        if each.group_size > 1:
            found[each.kind] += each.bytes
    return found
