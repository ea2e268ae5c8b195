"""The web application: routes, middleware, and how errors are told."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import mixtral_jax
from mixtral_jax.errors import MixtralError
from mixtral_jax.serve.access import Access
from mixtral_jax.serve.asking import DisconnectedError
from mixtral_jax.serve.auth import Auth
from mixtral_jax.serve.bounds import Limits, WriteStalledError, send_failure
from mixtral_jax.serve.exposition import Metrics
from mixtral_jax.serve.failures import Failure, Kind, family_of
from mixtral_jax.serve.options import ServeOptions
from mixtral_jax.serve.request import EngineProtocol
from mixtral_jax.serve.routes import chat, completions, status, tgi, tokens
from mixtral_jax.serve.routes.route import Json
from mixtral_jax.serve.schema.common import one_line
from mixtral_jax.serve.service import Service
from mixtral_jax.serve.tracing import Tracing
from mixtral_jax.tokenizer import Tokenizer

_KINDS: dict[int, Kind] = {404: "not_found", 405: "method_not_allowed"}
_EXPOSED = (
    "x-request-id", "x-ignored-parameters", "x-compute-time", "x-total-time", "x-queue-time",
    "x-inference-time", "x-time-per-token", "x-prompt-tokens", "x-generated-tokens", "retry-after",
)  # fmt: skip

_MOST_CHARACTERS = 200

logger = logging.getLogger(__name__)


def create_app(
    engine: EngineProtocol,
    tokenizer: Tokenizer | None,
    options: ServeOptions,
    *,
    keys: Sequence[bytes] = (),
    tracing: Tracing | None = None,
) -> FastAPI:
    """The application that serves an engine.

    Args:
        engine: generates; never called on jax's behalf here.
        tokenizer: of its model, if it has one.
        options: of the command line.
        keys: API keys; without any, everyone is served.
        tracing: where spans go; as the options say, unless given.

    Returns:
        An ASGI application; its ``state.service`` is what the routes share.
    """
    app = FastAPI(
        title="mixtral_jax.serve",
        version=mixtral_jax.__version__,
        openapi_url="/openapi.json",
        docs_url=None,  # its pages load scripts from other addresses
        redoc_url=None,
    )
    watch = options.watch
    app.state.service = service = Service(
        engine=engine,
        tokenizer=tokenizer,
        options=options,
        metrics=Metrics(engine),
        tracing=tracing or Tracing(watch.otlp_endpoint, watch.otlp_service_name),
    )
    for router in (tgi.router, chat.router, completions.router, tokens.router, status.router):
        app.include_router(router)
    app.add_api_route("/api-doc/openapi.json", _document, include_in_schema=False)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    # The last one added is the first to see a request.
    app.add_middleware(_Faults)
    app.add_middleware(Limits, flags=options.http)
    app.add_middleware(Auth, keys=keys, flags=options.http)
    if options.http.cors_allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.http.cors_allow_origin,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=_EXPOSED,
        )
    app.add_middleware(Access, service=service)
    return app


async def _document(request: Request) -> Response:
    return Json(request.app.openapi())


def _failed(request: Request, failure: Failure) -> Response:
    family = family_of(request.url.path)
    headers = dict(failure.headers or {})
    return Json(failure.body(family), failure.status(family), headers)


async def _on_failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, Failure)
    return _failed(request, error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = _KINDS.get(error.status_code, "validation")
    failure = Failure(kind, f"{request.method} {request.url.path[:100]}: {error.detail}")
    failure.headers = {**(failure.headers or {}), **(error.headers or {})}
    return _failed(request, failure)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    message, param = one_line(list(error.errors()))
    return _failed(request, Failure("validation", message, param=param))


async def _on_mixtral(request: Request, error: Exception) -> Response:
    return _failed(request, Failure("validation", str(error)))


async def _on_left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the log does


class _Faults:
    """Middleware that answers 500 where no handler knows better.

    Starlette's own stands outside of all others: its 500 would be without a name, a place in the
    counts, and the headers that let a page of another origin read it.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except WriteStalledError:
            raise
        except Exception:
            if has_begun:
                raise
            logger.exception("%s %s", scope["method"], scope["path"][:_MOST_CHARACTERS])
            failure = Failure("internal", "internal error; fix: report it with the log")
            await send_failure(scope, send, failure)


_HANDLERS = {
    Failure: _on_failure,
    HTTPException: _on_http,
    RequestValidationError: _on_invalid,
    MixtralError: _on_mixtral,
    DisconnectedError: _on_left,
}
