"""The outermost middleware: each request has a name, a line in the log, a place in the counts."""

from __future__ import annotations

import re
import time
import uuid
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixtral_jax.serve import logs
from mixtral_jax.serve.service import Service

_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_QUIET = {"/health", "/live", "/ping", "/metrics"}  # probes would fill the log
_INFERENCE = {
    "/", "/generate", "/generate_stream", "/invocations", "/v1/chat/completions", "/v1/completions",
}  # fmt: skip
_MOST_CHARACTERS = 200
_MOST_IGNORED_BYTES = 1000  # in a header: proxies take 4 to 8 KB of all headers together


class Access:
    """Middleware that names, counts and logs requests.

    Args:
        app: the application.
        service: whose metrics and options.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = request_id = _request_id(scope)
        state["log"] = {}
        status = 0
        started = time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *self._headers(state)]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            # A stream has its status before it is known how it ends.
            end = state.get("end_status", status)
            self._count(scope, status, end, time.perf_counter() - started)
            if scope["path"] not in _QUIET or status >= 500:
                logs.event(
                    "request",
                    request_id=request_id,
                    method=scope["method"],
                    path=scope["path"][:_MOST_CHARACTERS],
                    status=status or "left",
                    **({} if end == status else {"ended": end or "left"}),
                    seconds=round(time.perf_counter() - started, 6),
                    **state["log"],
                    **({"ignored": state["ignored"]} if state.get("ignored") else {}),
                )

    @staticmethod
    def _headers(state: dict) -> list[tuple[bytes, bytes]]:
        headers = [(b"x-request-id", state["request_id"].encode("latin-1"))]
        if state.get("ignored"):
            # Names come from the client: none may end the header, or be no header at all.
            names = [quote(name, safe="") or "%00" for name in state["ignored"]]
            while len(", ".join(names)) > _MOST_IGNORED_BYTES:
                names.pop()
            headers.append((b"x-ignored-parameters", ", ".join(names).encode("ascii")))
        return headers

    def _count(self, scope: Scope, status: int, end: int, seconds: float) -> None:
        metrics = self._service.metrics
        route = scope.get("route")
        # Only routes that exist: a client must not make series at will.
        path = getattr(route, "path", "other")
        method = scope["method"] if route is not None else "other"
        metrics.responses.labels(method, path, str(status or "left")).inc()
        if scope["method"] != "POST" or scope["path"] not in _INFERENCE:
            return
        metrics.count.inc()
        metrics.duration.observe(seconds)
        if end in (0, 499):
            metrics.disconnects.inc()
        elif end < 400:
            metrics.success.inc()
        else:
            metrics.failure.labels(_error_name(end)).inc()


def _error_name(status: int) -> str:
    names = {400: "validation", 422: "validation", 424: "generation", 429: "overloaded"}
    return names.get(status, {503: "unhealthy", 401: "unauthorized"}.get(status, str(status)))


def _request_id(scope: Scope) -> str:
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode("ascii") if _ID.fullmatch(given) else uuid.uuid4().hex
