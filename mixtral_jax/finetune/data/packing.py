"""Which examples share a row: whole ones only, by best fit, decreasing.

The longest examples are placed first, each into the row with the least room that still holds it.
It is the packing of TRL's "bfd" strategy. It depends on the lengths alone: every epoch has the same
rows (in another order), and every process finds them by itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64


class Packing(NamedTuple):
    """Rows of examples: row r has ``example_ids[starts[r] : starts[r + 1]]``, ascending."""

    example_ids: Int64[np.ndarray, " examples"]
    starts: Int64[np.ndarray, " bounds"]

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(self.starts) - 1

    def row(self, row_id: int) -> Int64[np.ndarray, " packed"]:
        """The examples of a row."""
        return self.example_ids[self.starts[row_id] : self.starts[row_id + 1]]


def alone(num_examples: int) -> Packing:
    """A row for each example."""
    return Packing(np.arange(num_examples), np.arange(num_examples + 1))


def best_fit(lengths: Int64[np.ndarray, " examples"], row_length: int) -> Packing:
    """Packs examples of these lengths, none above ``row_length``, into rows of ``row_length``."""
    row_ids = np.empty(len(lengths), np.int64)
    rows_by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # those that some row has, ascending
    num_rows = 0
    for example_id in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example_id])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row_id, room = num_rows, row_length
            num_rows += 1
        else:
            room = rooms[at]
            row_id = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rooms[at]
        row_ids[example_id] = row_id
        room -= length
        if room:
            if not rows_by_room[room]:
                insort(rooms, room)
            rows_by_room[room].append(row_id)
    example_ids = np.argsort(row_ids, kind="stable")
    starts = np.searchsorted(row_ids[example_ids], np.arange(num_rows + 1))
    return Packing(example_ids, starts)
