"""Server-sent events: frames as TGI and OpenAI write them, ended when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mixtral_jax.serve.failures import Failure, Family, dumps

KEEP_ALIVE_SECONDS = 15.0  # proxies close what is silent
_COMMENT = b":\n\n"
_PREFIX = {"tgi": b"data:", "openai": b"data: "}
DONE = b"data: [DONE]\n\n"

logger = logging.getLogger(__name__)


def frame(value: Any, family: Family) -> bytes:
    """A JSON value as one event."""
    return _PREFIX[family] + dumps(value) + b"\n\n"


class EventStream(Response):
    """An answer that is sent while it is made.

    When it is over, ``end_status`` in the scope's state says how it ended, as a status: 0 where the
    client left.

    Args:
        frames: bytes of the events. It may raise Failure, which becomes the last event; it is
            closed when the client leaves.
        family: whose manners an error has.
        headers: beside those of every event stream.
        on_end: called at the end, also where the answer never began.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        family: Family,
        headers: Mapping[str, str] | None = None,
        *,
        on_end: Callable[[], None],
    ):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers.update(headers or {})
        self._frames = frames
        self._family: Family = family
        self._on_end = on_end
        self._found_status = 200
        self._end_status = 0  # until everything is sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events until they end or the client leaves."""
        sender = asyncio.ensure_future(self._send(send))
        watcher = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            # First of all: of an answer that never began, nobody closes the frames.
            self._on_end()
            for task in (sender, watcher):
                task.cancel()
            await asyncio.gather(sender, watcher, return_exceptions=True)
            scope.setdefault("state", {})["end_status"] = self._end_status

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(_with_comments(self._whole())) as frames:
            async for data in frames:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        self._end_status = self._found_status

    async def _whole(self) -> AsyncGenerator[bytes, None]:
        try:
            async with contextlib.aclosing(self._frames) as frames:
                async for data in frames:
                    yield data
        except Failure as failure:
            yield self._last(failure)
        except Exception:
            logger.exception("a stream broke off")
            yield self._last(Failure("internal", "the answer broke off"))

    def _last(self, failure: Failure) -> bytes:
        self._found_status = failure.status(self._family)
        return frame(failure.body(self._family), self._family)


async def _with_comments(frames: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The frames, with a comment wherever nothing comes for a while."""
    following = asyncio.ensure_future(anext(frames, None))
    try:
        while True:
            await asyncio.wait({following}, timeout=KEEP_ALIVE_SECONDS)
            if not following.done():
                yield _COMMENT
                continue
            data = following.result()
            if data is None:
                return
            yield data
            following = asyncio.ensure_future(anext(frames, None))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await frames.aclose()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
