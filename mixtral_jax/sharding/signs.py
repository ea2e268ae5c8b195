"""Signs of work, and the rule that tells a stuck process from a slow one.

Every process counts the places that all must come to: steps and barriers. One that is behind is
stuck when it shows no sign of work for a timeout. It works while it uses the CPU (it compiles,
perhaps: for ``PATIENCE`` timeouts at most), or while it reads or writes files (it loads).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Container, Mapping
from pathlib import Path

PATIENCE = 60  # a process that only computes may be behind so many timeouts
_BUSY = 0.1  # share of one core above which a process computes
_MOVES = 1 << 16  # bytes read or written between two beats above which it moves data
_COUNTED = ("rchar", "wchar", "read_bytes", "write_bytes")  # by calls, and by the disk


class Work:
    """What this process has done since it was last asked."""

    def __init__(self):
        self._time, self._cpu, self._bytes = _now()

    def since(self) -> dict[str, bool]:
        """Whether it ``computes``, and whether it ``moves`` data."""
        before, cpu, moved = self._time, self._cpu, self._bytes
        self._time, self._cpu, self._bytes = _now()
        return {
            "computes": self._cpu - cpu > _BUSY * (self._time - before),
            "moves": self._bytes - moved > _MOVES,
        }


def _now() -> tuple[float, float, int]:
    counts = {}
    with contextlib.suppress(OSError):  # no Linux
        lines = Path("/proc/self/io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
    return time.monotonic(), time.process_time(), sum(int(counts.get(n, 0)) for n in _COUNTED)


@dataclasses.dataclass
class Peer:
    """What process 0 knows of a process.

    ``heard``, ``came``, ``moved`` and ``computed`` are when it last gave a sign of life, came to a
    new place, moved data and used the CPU.
    """

    name: str
    send: Callable[[dict], None]
    heard: float
    steps: int = 0
    place: str = "the start"
    came: float = 0.0
    moved: float = 0.0
    computed: float = 0.0
    has_left: bool = False

    def __post_init__(self):
        self.came = self.heard

    def note(self, state: Mapping, now: float) -> None:
        """What it says of itself: ``steps``, ``place``, ``computes`` and ``moves``."""
        self.heard = now
        if state["steps"] != self.steps:
            self.steps, self.place, self.came = state["steps"], state["place"], now
        if state["moves"]:
            self.moved = now
        if state["computes"]:
            self.computed = now


def find_lost(
    peers: Mapping[int, Peer], now: float, timeout: float, excused: Container[int] = ()
) -> tuple[int, str] | None:
    """The first process that is silent or stuck, and the words for it.

    Args:
        peers: by process.
        now: of ``time.monotonic()``.
        timeout: seconds without a sign of life, or of work while others wait.
        excused: processes that may let the others wait.
    """
    staying = {rank: peer for rank, peer in peers.items() if not peer.has_left}
    furthest = max(peer.steps for peer in staying.values())
    first = min((p for p in staying.values() if p.steps == furthest), key=lambda p: p.came)
    for rank, peer in staying.items():
        if now - peer.heard > timeout:
            return rank, f"is silent for {now - peer.heard:.0f} s"
        if peer.steps == furthest or rank in excused:
            continue
        behind = now - max(first.came, peer.came, peer.moved)
        if min(behind, now - peer.computed) > timeout or behind > PATIENCE * timeout:
            since = f"others came to {first.place} {now - first.came:.0f} s ago"
            return rank, f"is stuck after {peer.place}: {since}"
    return None
