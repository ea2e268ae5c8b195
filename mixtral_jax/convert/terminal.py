"""What a conversion shows at the terminal, and what stops it from there."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


class Shown(NamedTuple):
    """What a conversion is given to call.

    Attributes:
        note: with one line for people.
        progress: with how much is done, and how much there is.
        say: with what is being done now.
        stop: true once the work was asked to end.
    """

    note: Callable[[str], None]
    progress: Callable[[int, int], None]
    say: Callable[[str], None]
    stop: Stop


@contextlib.contextmanager
def shown(doing: str, *columns: Any) -> Iterator[Shown]:
    """A progress bar on stderr, and signals that end the work.

    Args:
        doing: stands before the bar.
        columns: of rich, between the bar and the time that remains.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, soft_wrap=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, Stop(console) as stop:
        task = bar.add_task(doing, total=None)
        yield Shown(
            note=lambda line: console.print(f"note: {line}", markup=False, highlight=False),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            say=lambda doing: bar.update(task, description=doing),
            stop=stop,
        )
