"""Peak anonymous memory of this process, sampled."""

from __future__ import annotations

import resource
import sys
import threading
from types import TracebackType

_INTERVAL_SECONDS = 0.02


def anonymous_bytes() -> int | None:
    """Anonymous resident memory now; None where the system does not tell (not Linux)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class PeakMemory:
    """Samples while its block runs; ``bytes`` is the peak.

    Where the system does not tell anonymous memory, all resident memory of the process's life.
    """

    def __init__(self):
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)

    def _sample(self) -> None:
        while True:
            self._take()
            if self._stop.wait(_INTERVAL_SECONDS):
                return

    def _take(self) -> None:
        now = anonymous_bytes()
        if now is None:
            unit = 1 if sys.platform == "darwin" else 1024
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.bytes = max(self.bytes, now)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._take()
