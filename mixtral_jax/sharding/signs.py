"""What process 0 knows of a process, from what that says of itself."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

PATIENCE = 60  # a busy process may be behind so many timeouts
_BUSY = 0.2  # share of one core above which a process counts as working


@dataclasses.dataclass
class Peer:
    """What process 0 knows of a process.

    ``changed`` is when its steps last changed; ``busy`` whether it used the CPU (``cpu`` seconds
    so far) in a window of time that ended at ``looked``.
    """

    name: str
    send: Callable[[dict], None]
    heard: float
    steps: int = 0
    cpu: float = 0.0
    changed: float = 0.0
    looked: float = 0.0
    cpu_then: float = 0.0
    busy: bool = True
    has_left: bool = False

    def __post_init__(self):
        self.changed = self.looked = self.heard

    def note(self, state: dict) -> None:
        """What it says of itself."""
        self.cpu = state["cpu"]
        if state["steps"] != self.steps:
            self.steps, self.changed = state["steps"], time.monotonic()

    def look(self, now: float, window: float) -> None:
        """Once in a while: has it used the CPU since the last look?"""
        if now - self.looked >= window:
            self.busy = self.cpu - self.cpu_then > _BUSY * (now - self.looked)
            self.looked, self.cpu_then = now, self.cpu
