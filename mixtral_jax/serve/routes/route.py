"""How a route reads its body and says what it may answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from mixtral_jax.serve.failures import ANSWERS, Failure, Family, dumps
from mixtral_jax.serve.schema.common import Strict
from mixtral_jax.serve.schema.openai import OpenAIError
from mixtral_jax.serve.schema.tgi import TgiError
from mixtral_jax.serve.service import service_of
from mixtral_jax.serve.strict_json import BadJSONError, parse


class Json(Response):
    """A JSON answer; numbers that JSON cannot hold never reach it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes."""
        return dumps(content)


class _StrictRequest(Request):
    async def json(self) -> Any:
        """The body, read strictly."""
        depth = service_of(self).options.http.json_depth
        try:
            return parse(await self.body(), max_depth=depth)
        except BadJSONError as error:
            raise Failure("validation", str(error)) from None


class StrictRoute(APIRoute):
    """A route whose JSON body is read strictly, and only as JSON.

    A web page of another origin may post ``text/plain`` here without asking; not JSON.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler with our reading of the body."""
        handler = super().get_route_handler()
        has_body = self.body_field is not None

        async def handle(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if has_body and kind != "application/json":
                message = f"content-type: expected application/json, got {kind or 'none'}"
                raise Failure("unsupported_media_type", message)
            request.state.received_at = time.perf_counter()
            return await handler(_StrictRequest(request.scope, request.receive))

        return handle


def check_names(request: Request, body: Strict) -> None:
    """Notes parameters that are not known here, for the header and the log.

    Raises:
        Failure: one of them is refused.
    """
    unknown = body.check_names()
    if unknown:
        request.state.ignored = [name[:64] for name in unknown]


_ERRORS = [
    "unauthorized",
    "timeout",
    "payload_too_large",
    "unsupported_media_type",
    "headers_too_large",
]
_GENERATION = [*_ERRORS, "validation", "generation", "overloaded", "unhealthy"]


# One event of a stream; its data is JSON, and in OpenAI's streams at last [DONE].
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "contentMediaType": "application/json"}},
    "required": ["data"],
}


def answers(
    family: Family, model: Any, *, generates: bool = True, streams: bool = False
) -> dict[int | str, dict[str, Any]]:
    """What a route may answer, for the OpenAPI document."""
    error = OpenAIError if family == "openai" else TgiError
    kinds = _GENERATION if generates else [*_ERRORS, "validation", "unhealthy"]
    found: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        answer = ANSWERS[kind]
        status = answer.openai_status if family == "openai" else answer.tgi_status
        found[status] = {"model": error, "description": kind.replace("_", " ").capitalize()}
    ok: dict[str, Any] = {"description": "The answer"}
    if model is not None:
        ok["model"] = model
    if streams:
        ok["content"] = {"text/event-stream": {"schema": _EVENT}}
    found[200] = ok
    return found


def finite(logprob: float | None) -> float | None:
    """A log-probability as JSON can hold it: -inf becomes -9999, as OpenAI has it."""
    if logprob is None or math.isnan(logprob):
        return None
    return max(min(logprob, 9999.0), -9999.0)
