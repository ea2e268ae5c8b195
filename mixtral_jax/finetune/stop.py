"""SIGINT and SIGTERM in training: the first ends it after a checkpoint, the second at once."""

from __future__ import annotations

import os
import signal
from typing import Any

from mixtral_jax.errors import INTERRUPTED

_STDERR = 2


class Stop:
    """Notes the first signal while there is something to save; otherwise it ends the process.

    Ending at once is safe: every file that matters is written beside its name and then renamed. An
    exception that a signal raises inside a library may leave its threads waiting for ever.

    Attributes:
        is_saving: somebody looks at ``asked`` after each step, and saves.
        asked: the work was asked to end.
    """

    def __init__(self):
        self.is_saving = self.asked = False

    def __enter__(self) -> Stop:
        signals = (signal.SIGINT, signal.SIGTERM)
        self._before = {signum: signal.signal(signum, self._handle) for signum in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if self.is_saving and not self.asked:
            self.asked = True
            _say("note: saving a checkpoint after this step; press again to stop now")
            return
        _say("error: interrupted; fix: run the same command again to resume")
        os._exit(INTERRUPTED)


def _say(line: str) -> None:
    # Not through a console, whose locks the main thread may hold; below its bar, with a cursor.
    below = "\n\x1b[?25h" if os.isatty(_STDERR) else ""
    os.write(_STDERR, f"{below}{line}\n".encode())
