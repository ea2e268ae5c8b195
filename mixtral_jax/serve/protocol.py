"""uvicorn's HTTP/1.1 protocol with what it leaves to a proxy: slow or huge headers, dead readers.

Bodies and answers are bounded in bounds.py, which is ASGI; before the headers are whole there is no
ASGI event, and a connection can only be dropped from here.
"""

from __future__ import annotations

import asyncio
import functools
import sys
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from mixtral_jax.serve.bounds import ABORT
from mixtral_jax.serve.failures import Failure, dumps
from mixtral_jax.serve.options import HttpFlags


class BoundedProtocol(H11Protocol):
    """A connection whose client has to send and read in time.

    Args:
        flags: timeouts and sizes.
        args: of uvicorn's protocol.
        kwargs: of uvicorn's protocol.
    """

    def __init__(self, flags: HttpFlags, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._flags = flags
        self._headers_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None
        self._inner: Any = self.app
        self.app = self._run

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came: its first headers are due."""
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """It went."""
        self._stop_waiting()
        self._stop_watching()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came; of a next request, its headers are due from the first one on."""
        if self._headers_due is None and self.conn.their_state is h11.IDLE:
            self._await_headers()
        super().data_received(data)
        self._read_on()

    def on_response_complete(self) -> None:
        """An answer is written; whether it was read shows later."""
        super().on_response_complete()
        self._await_reader()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, or headers that are too large."""
        if self.cycle is not None and not self.cycle.response_complete:
            # An answer is under way on this connection: nothing can be said on it.
            self.transport.abort()
            return
        error = sys.exception()
        if isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431:
            most = self._flags.header_limit
            self._refuse(Failure("headers_too_large", f"headers: expected at most {most} bytes"))
        else:
            self._refuse(Failure("validation", "expected an HTTP/1.1 request"), status=400)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._stop_waiting()
        self._stop_watching()  # the next answer fills what is left; its own sending is timed
        scope.setdefault("extensions", {})[ABORT] = self.transport.abort
        await self._inner(scope, receive, send)

    def _read_on(self) -> None:
        """Keeps reading what a client sends beyond its request: else its leaving is not seen.

        uvicorn pauses there until the answer is sent. One that sends more than headers is dropped.
        """
        if self.conn.their_state is not h11.DONE or self.cycle.response_complete:
            return
        if len(self.conn.trailing_data[0]) > self._flags.header_limit:
            self.transport.abort()
        else:
            self.flow.resume_reading()

    def _await_headers(self) -> None:
        seconds = self._flags.header_timeout
        self._headers_due = self.loop.call_later(seconds, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def _too_slow(self) -> None:
        self._headers_due = None
        if self.transport.is_closing():
            return
        seconds = self._flags.header_timeout
        self._refuse(Failure("timeout", f"the headers did not arrive within {seconds:g} s"))

    def _refuse(self, failure: Failure, status: int | None = None) -> None:
        """Answers without the application, which has not seen a request yet."""
        self._stop_waiting()
        body = dumps(failure.body("tgi"))
        status = failure.status("tgi") if status is None else status
        head = (
            f"HTTP/1.1 {status} Refused\r\nconnection: close\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        self.transport.write(head.encode("ascii") + body)
        self.transport.close()
        self._await_reader()

    def _await_reader(self) -> None:
        self._stop_watching()
        left = self.transport.get_write_buffer_size()
        if left > 0:
            seconds = self._flags.write_timeout
            self._reading_due = self.loop.call_later(seconds, self._drop_unread, left)

    def _stop_watching(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None

    def _drop_unread(self, left: int) -> None:
        """Drops a client that has read nothing meanwhile; a slow one has time again."""
        if self.transport.get_write_buffer_size() >= left:
            self.transport.abort()
        else:
            self._await_reader()


def protocol_of(flags: HttpFlags) -> Any:
    """What uvicorn makes for each connection."""
    return functools.partial(BoundedProtocol, flags)
