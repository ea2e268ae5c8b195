"""The events of one request on their way from the engine's thread to whoever reads them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from mixtral_jax.serve.request import Event, Failed, Finished


class EngineTicket:
    """A Ticket (request.py): one writer, one reader, in any threads.

    Args:
        cancel: tells the engine that nobody waits any more.
    """

    def __init__(self, cancel: Callable[[EngineTicket], None]):
        self._cancel = cancel
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], object] | None = None
        self._is_ended = False

    def push(self, events: Sequence[Event]) -> None:
        """Adds events; none follow a Finished or Failed."""
        with self._changed:
            for event in events:
                if not self._is_ended:
                    self._events.append(event)
                    self._is_ended = isinstance(event, Finished | Failed)
            self._changed.notify_all()
            wake = self._wake
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # the reader's loop is closed
                wake()

    @property
    def is_ended(self) -> bool:
        """Whether its last event was given."""
        return self._is_ended

    def iterate(self) -> Iterator[Event]:
        """See Ticket."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events)
                batch = self._take()
            yield from batch
            if isinstance(batch[-1], Finished | Failed):
                return

    async def events(self) -> AsyncIterator[Event]:
        """See Ticket."""
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._wake = lambda: loop.call_soon_threadsafe(ready.set)
        while True:
            ready.clear()
            with self._changed:
                batch = self._take()
            for event in batch:
                yield event
            if batch and isinstance(batch[-1], Finished | Failed):
                return
            if not batch:
                await ready.wait()

    def cancel(self) -> None:
        """See Ticket."""
        if not self._is_ended:
            self._cancel(self)

    def _take(self) -> list[Event]:
        batch = list(self._events)
        self._events.clear()
        return batch
