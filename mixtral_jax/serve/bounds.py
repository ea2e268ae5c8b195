"""What a client may take from the server: bytes and seconds. Pure ASGI, around every route.

A body is read whole before the application sees the request, so no handler waits for a slow
sender, and what is read on after it is the client leaving. Headers are the protocol's matter
(protocol.py): there is no ASGI event before them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixtral_jax.serve.failures import Failure, dumps, family_of
from mixtral_jax.serve.options import HttpFlags

_DISCARDED = 8  # times the allowed body
ABORT = "mixtral.abort"  # an extension of protocol.py: drops the connection and what it holds


class WriteStalledError(ConnectionError):
    """The client does not read."""


class Limits:
    """Middleware that bounds bodies and the time that sending may take.

    Args:
        app: the application.
        flags: the limits.
    """

    def __init__(self, app: ASGIApp, flags: HttpFlags):
        self._app = app
        self._flags = flags

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        bounded = _bounded(send, self._flags.write_timeout, scope)
        try:
            body = await self._body(scope, receive)
            if body is not None:
                await self._app(scope, _replayed(body, receive), bounded)
        except Failure as failure:
            await send_failure(scope, bounded, failure)
        except WriteStalledError:
            pass

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client left while it was sent."""
        most = self._flags.payload_limit
        headers = dict(scope["headers"])
        try:
            said = int(headers.get(b"content-length", b"0"))
        except ValueError:
            raise Failure("validation", "content-length: expected a number") from None
        try:
            async with asyncio.timeout(self._flags.body_timeout):
                if said <= most:
                    return await _read(receive, most)
                if b"expect" not in headers:  # a client that waits for a word gets its answer now
                    await _discard(receive, most)
                raise _too_large(most, said)
        except TimeoutError:
            seconds = self._flags.body_timeout
            raise Failure("timeout", f"the body did not arrive within {seconds:g} s") from None


async def _read(receive: Receive, most: int) -> bytes | None:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > most:
            if message.get("more_body", False):
                await _discard(receive, most)
            raise _too_large(most, len(body))
        if not message.get("more_body", False):
            return bytes(body)


async def _discard(receive: Receive, most: int) -> None:
    """Reads on for a while: an answer on a connection with unread bytes would be lost (a reset)."""
    read = 0
    while read <= _DISCARDED * most:
        message = await receive()
        read += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return


def _too_large(most: int, got: int) -> Failure:
    return Failure("payload_too_large", f"body: expected at most {most} bytes, got {got}")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body once and then goes on with the real one."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay


def _bounded(send: Send, seconds: float, scope: Scope) -> Send:
    """A ``send`` that gives up on a client that does not read."""
    abort: Callable[[], Any] | None = scope.get("extensions", {}).get(ABORT)

    async def bounded(message: Message) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except TimeoutError:
            if abort is not None:
                abort()
            raise WriteStalledError(f"the client did not read for {seconds:g} s") from None

    return bounded


async def send_failure(scope: Scope, send: Send, failure: Failure) -> None:
    """Answers with an error in the manner of the route's family, and ends the connection.

    What else the client was about to send on it is not read.
    """
    family = family_of(scope["path"])
    body = dumps(failure.body(family))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **(failure.headers or {}),
    }
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": failure.status(family), "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})
