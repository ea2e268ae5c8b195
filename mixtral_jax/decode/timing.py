"""Wall time with compilation set apart."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter

import jax

_PREFIX = "/jax/core/compile/"  # tracing, lowering and compiling all report under it
_COMPILED = f"{_PREFIX}backend_compile_duration"


class _CompileClock:
    def __init__(self):
        self.seconds = 0.0
        self.compiled: Counter[int] = Counter()  # programs, by thread

    def __call__(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(_PREFIX):
            self.seconds += duration_secs
        if event == _COMPILED:
            self.compiled[threading.get_ident()] += 1


@functools.cache
def _clock() -> _CompileClock:
    clock = _CompileClock()
    jax.monitoring.register_event_duration_secs_listener(clock)
    return clock


def num_compiled() -> int:
    """Programs that this thread has compiled since it first asked."""
    return _clock().compiled[threading.get_ident()]


class Stopwatch:
    """Seconds since it was made, split into compiling and the rest."""

    def __init__(self):
        self._compiled = _clock().seconds
        self._started = time.perf_counter()

    def read(self) -> tuple[float, float]:
        """(seconds without compilation, seconds of compilation)."""
        total = time.perf_counter() - self._started
        compiling = min(_clock().seconds - self._compiled, total)
        return total - compiling, compiling
