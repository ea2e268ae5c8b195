"""Slots: the rows of the pools, in a few classes of length so that memory follows use.

Pure Python. A pool is one array of rows, all of one length; a request takes a row of the shortest
class that has one free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mixtral_jax.errors import USAGE, MixtralError

SHORTEST = 128  # tokens of the first class
GROWTH = 4  # each class is so many times as long as the one before
DEFAULT_ROWS = 8  # rows of a class, where memory allows
FEWEST_ROWS = 2  # a product of one row differs from the same row among two (decode/generate.py)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthClass:
    """``rows`` slots of ``length`` tokens each, prompt and answer."""

    length: int
    rows: int


def class_lengths(max_total_tokens: int) -> list[int]:
    """Lengths in powers of ``GROWTH`` up to ``max_total_tokens``, which is the last."""
    lengths, length = [], SHORTEST
    while length < max_total_tokens:
        lengths.append(length)
        length *= GROWTH
    return [*lengths, max_total_tokens]


def plan_classes(
    max_total_tokens: int,
    *,
    max_batch_total_tokens: int | None = None,
    max_batch_size: int | None = None,
    multiple: int = FEWEST_ROWS,
    spread: int = 1,
) -> tuple[LengthClass, ...]:
    """How many slots each length class gets.

    All classes get an equal share of the tokens, as many rows as that pays for: at most
    ``max_batch_size``, at least ``multiple * spread``. So many rows, spread over devices, cost each
    of them what ``multiple`` rows cost that all of them hold; so tokens that pay for ``multiple``
    rows are enough, and the slots may then hold more tokens than requests may use.

    Args:
        max_total_tokens: of one request.
        max_batch_total_tokens: of all slots; enough for ``DEFAULT_ROWS`` short rows and half as
            many of the longest class, if None.
        max_batch_size: rows that may run at one time.
        multiple: rows must be a multiple of this (of the data axis, and of ``FEWEST_ROWS``),
        spread: and of this times as many, to lie on so many more devices.

    Raises:
        MixtralError: exit code 64 if the tokens do not pay for ``multiple`` rows of each class.
    """
    lengths, least = class_lengths(max_total_tokens), multiple * spread
    most = _round_up(max_batch_size or max(DEFAULT_ROWS, least), least)
    if max_batch_total_tokens is None:
        fewest = _round_up(max(least, most // 2), least)
        rows = [most] * (len(lengths) - 1) + [fewest if len(lengths) > 1 else most]
    else:
        if max_batch_total_tokens < sum(lengths) * multiple:
            raise MixtralError(
                "--max-batch-total-tokens",
                expected=f"at least {sum(lengths) * multiple} ({multiple} slots for each of "
                f"the lengths {', '.join(map(str, lengths))})",
                got=max_batch_total_tokens,
                fix="raise it, or lower --max-total-tokens",
                code=USAGE,
            )
        share = max_batch_total_tokens // len(lengths)
        rows = [min(most, max(least, share // n // least * least)) for n in lengths]
        needed = sum(n * r for n, r in zip(lengths, rows, strict=True))
        # The shortest classes are cheap, but even so the sum must fit: take from the largest.
        while needed > max_batch_total_tokens and max(rows) > least:
            heaviest = max(range(len(rows)), key=lambda i: (rows[i] > least, lengths[i]))
            rows[heaviest] -= least
            needed -= lengths[heaviest] * least
    return tuple(LengthClass(length=n, rows=r) for n, r in zip(lengths, rows, strict=True) if r > 0)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Slot:
    """A row of the pool of a class."""

    class_id: int
    row: int


class Slots:
    """Which rows are free. Not thread-safe: the engine's thread owns it.

    Args:
        classes: in order of length.
    """

    def __init__(self, classes: Sequence[LengthClass]):
        self.classes = tuple(classes)
        self._free = [list(range(c.rows - 1, -1, -1)) for c in self.classes]
        self._taken: set[Slot] = set()

    def fitting(self, total_tokens: int) -> range:
        """Classes that are long enough, shortest first."""
        first = next(
            (i for i, c in enumerate(self.classes) if c.length >= total_tokens), len(self.classes)
        )
        return range(first, len(self.classes))

    def num_free(self, class_id: int) -> int:
        """Free rows of a class."""
        return len(self._free[class_id])

    @property
    def num_taken(self) -> int:
        """Rows in use, of all classes."""
        return len(self._taken)

    def take(self, class_id: int) -> Slot:
        """A free row of a class, which must have one."""
        slot = Slot(class_id, self._free[class_id].pop())
        self._taken.add(slot)
        return slot

    def free(self, slot: Slot) -> None:
        """Gives a row back, once."""
        self._taken.remove(slot)
        self._free[slot.class_id].append(slot.row)
