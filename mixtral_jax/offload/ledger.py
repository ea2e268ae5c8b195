"""Bytes of one device: what is held there, under a budget that nothing may exceed."""

from __future__ import annotations

import math
import re

from mixtral_jax.errors import INTERNAL, USAGE, MixtralError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str | int) -> int:
    """Bytes of ``20GB``, ``256MB``, ``1.5GiB`` or a plain number.

    Raises:
        MixtralError: exit code 64 for anything else, or nothing.
    """
    found = _SIZE.fullmatch(str(text).strip())
    size = 0
    if found is not None:
        number, letter, binary = found.groups()
        size = int(float(number) * (1024 if binary else 1000) ** _POWERS[letter.lower()])
    if size < 1:
        raise MixtralError(
            "--device-memory", expected="a size like 20GB or 512MB", got=repr(text), code=USAGE
        )
    return size


def size_for(num_bytes: float) -> str:
    """A size that ``parse_size`` reads, not below so many bytes."""
    return f"{math.ceil(num_bytes / 1e6)}MB"


class Ledger:
    """What a device holds, by kind; the sum never exceeds the budget.

    Args:
        budget: bytes.

    Attributes:
        held: bytes now, by kind.
        peak: the largest sum so far.
        at_peak: ``held`` as it was then.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.held: dict[str, int] = {}
        self.peak = 0
        self.at_peak: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Bytes held now."""
        return sum(self.held.values())

    @property
    def room(self) -> int:
        """Bytes that may still be allocated."""
        return self.budget - self.total

    def hold(self, kind: str, num_bytes: int) -> None:
        """Enters an allocation, or with a negative number its end.

        Raises:
            MixtralError: exit code 70 past the budget: whoever allocates must have made room.
        """
        self.held[kind] = self.held.get(kind, 0) + num_bytes
        assert self.held[kind] >= 0, (kind, self.held)
        if self.total > self.budget:
            raise MixtralError(
                f"{kind} on the device",
                expected=f"at most {self.budget:,} bytes in all",
                got=f"{self.total:,}",
                code=INTERNAL,
            )
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.held)

    def replace(self, kind: str, num_bytes: int) -> None:
        """Enters what a kind holds from now on."""
        self.hold(kind, num_bytes - self.held.get(kind, 0))
