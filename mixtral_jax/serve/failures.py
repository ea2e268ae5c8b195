"""What can go wrong with a request, and how each family of routes says it.

TGI's routes answer ``{"error": ..., "error_type": ...}``, OpenAI's (/v1) ``{"error": {"message":
..., "type": ..., "param": ..., "code": ...}}``; the status codes differ where the originals do.
"""

from __future__ import annotations

import json
import math
from typing import Any, Literal, NamedTuple

from starlette.exceptions import HTTPException

from mixtral_jax.errors import printable

Family = Literal["tgi", "openai"]
Kind = Literal[
    "validation",
    "template_error",
    "tool_error",
    "unauthorized",
    "not_found",
    "method_not_allowed",
    "timeout",
    "payload_too_large",
    "unsupported_media_type",
    "headers_too_large",
    "generation",
    "overloaded",
    "unhealthy",
    "internal",
]
_MOST_CHARACTERS = 500


class _Answer(NamedTuple):
    tgi_status: int
    openai_status: int
    openai_type: str
    openai_code: str | None


_INVALID = "invalid_request_error"
ANSWERS: dict[str, _Answer] = {
    "validation": _Answer(422, 400, _INVALID, None),
    "template_error": _Answer(422, 400, _INVALID, None),
    "tool_error": _Answer(422, 400, _INVALID, None),
    "unauthorized": _Answer(401, 401, _INVALID, "invalid_api_key"),
    "not_found": _Answer(404, 404, _INVALID, "not_found"),
    "method_not_allowed": _Answer(405, 405, _INVALID, "method_not_allowed"),
    "timeout": _Answer(408, 408, "timeout_error", "timeout"),
    "payload_too_large": _Answer(413, 413, _INVALID, "payload_too_large"),
    "unsupported_media_type": _Answer(415, 415, _INVALID, "unsupported_media_type"),
    "headers_too_large": _Answer(431, 431, _INVALID, "headers_too_large"),
    "generation": _Answer(424, 424, "server_error", "generation"),
    "overloaded": _Answer(429, 429, "rate_limit_error", "overloaded"),
    "unhealthy": _Answer(503, 503, "server_error", "unavailable"),
    "internal": _Answer(500, 500, "server_error", "internal"),
}


class Failure(HTTPException):
    """A request that gets no answer.

    Args:
        kind: which of ``ANSWERS``.
        message: one line for people.
        param: the parameter at fault, for OpenAI's clients.
        retry_seconds: when another try may help (Retry-After).
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        param: str | None = None,
        retry_seconds: float | None = None,
    ):
        line = printable(message)
        self.kind: Kind = kind
        self.message = line if len(line) <= _MOST_CHARACTERS else line[:_MOST_CHARACTERS] + " ..."
        self.param = param
        headers = {}
        if retry_seconds is not None:
            headers["retry-after"] = str(max(1, math.ceil(retry_seconds)))
        if kind == "unauthorized":
            headers["www-authenticate"] = "Bearer"
        super().__init__(ANSWERS[kind].tgi_status, self.message, headers)

    def status(self, family: Family) -> int:
        """The HTTP status in that family of routes."""
        answer = ANSWERS[self.kind]
        return answer.openai_status if family == "openai" else answer.tgi_status

    def body(self, family: Family) -> dict[str, Any]:
        """The JSON value in that family of routes."""
        if family == "tgi":
            return {"error": self.message, "error_type": self.kind}
        answer = ANSWERS[self.kind]
        return {
            "error": {
                "message": self.message,
                "type": answer.openai_type,
                "param": self.param,
                "code": answer.openai_code,
            }
        }


def family_of(path: str) -> Family:
    """Whose manners a route has."""
    return "openai" if path == "/v1" or path.startswith("/v1/") else "tgi"


def dumps(value: Any) -> bytes:
    """JSON bytes of an answer; a number that JSON cannot hold is our own fault."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8")
