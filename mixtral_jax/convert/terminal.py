"""What stops a conversion from the terminal."""

from __future__ import annotations

import os
import signal
from typing import Any

from mixtral_jax.errors import INTERRUPTED

_STDERR = 2


class Stop:
    """SIGINT and SIGTERM. Between leaves the work can end in order; elsewhere it ends at once.

    Ending at once is safe as well, and more so than an exception: one that a signal raises inside
    Orbax, or while files are fetched, leaves threads waiting for ever.
    """

    def __init__(self, console: Any):
        self.console = console
        self.is_listening = self.asked = False  # listening: somebody asks before each leaf

    def __call__(self) -> bool:
        """True once the work was asked to end; says that somebody asks."""
        self.is_listening = True
        return self.asked

    def __enter__(self) -> Stop:
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {signum: signal.signal(signum, self._handle) for signum in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.is_listening and not self.asked:
            self.asked = True
            self._say("note: stopping after this leaf; press again to stop now")
            return
        self._say("error: interrupted; fix: run the same command again to resume")
        os._exit(INTERRUPTED)

    def _say(self, line: str) -> None:
        # Not through the console, whose locks other threads hold; below its bar, with a cursor.
        below = "\n\x1b[?25h" if self.console.is_terminal else ""
        os.write(_STDERR, f"{below}{line}\n".encode())
