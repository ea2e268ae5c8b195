"""Whether the server serves, what it serves, and what it counts; and the chat page."""

from __future__ import annotations

import base64
import functools
import hashlib
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

import mixtral_jax
from mixtral_jax.serve.exposition import CONTENT_TYPE
from mixtral_jax.serve.failures import Failure
from mixtral_jax.serve.routes.route import Json, StrictRoute
from mixtral_jax.serve.schema.openai import Models
from mixtral_jax.serve.schema.tgi import Info, TgiError
from mixtral_jax.serve.service import service_of

router = APIRouter(route_class=StrictRoute, tags=["Status"])

PAGE = Path(__file__).parent.parent / "page" / "index.html"
_HEALTH: dict[int | str, dict[str, Any]] = {
    200: {"description": "Everything is working", "content": {"text/plain": {}}},
    503: {"model": TgiError, "description": "Loading, draining or failed"},
}


@router.head("/health", include_in_schema=False)
@router.get("/health", responses=_HEALTH)
async def health(request: Request) -> Response:
    """Readiness, as TGI's: 503 while requests are not taken."""
    service_of(request).check_ready()
    return Response(media_type="text/plain")


@router.head("/ping", include_in_schema=False)
@router.get("/ping", responses=_HEALTH)
async def ping(request: Request) -> Response:
    """/health, as SageMaker calls it."""
    return await health(request)


@router.head("/live", include_in_schema=False)
@router.get("/live", responses=_HEALTH)
async def live(request: Request) -> Response:
    """Liveness: 503 only where a restart is what helps."""
    if service_of(request).engine.state() == "failed":
        raise Failure("unhealthy", "the engine has failed; fix: restart")
    return Response(media_type="text/plain")


@router.get("/info", responses={200: {"model": Info}})
async def info(request: Request) -> Response:
    """What is served, and within which limits."""
    service = service_of(request)
    model, limits, flags = service.engine.model, service.engine.limits, service.options.request
    found = Info(
        model_id=model.name,
        model_sha=model.digest,
        model_pipeline_tag="text-generation",
        model_dtype=model.dtype,
        model_device_type="jax",
        max_concurrent_requests=limits.max_concurrent_requests,
        max_best_of=flags.max_best_of,
        max_stop_sequences=flags.max_stop_sequences,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        max_batch_total_tokens=limits.max_batch_total_tokens,
        max_client_batch_size=flags.max_client_batch_size,
        waiting_served_ratio=limits.waiting_served_ratio,
        validation_workers=1,
        router="mixtral_jax.serve",
        version=mixtral_jax.__version__,
        sha=None,
        docker_label=None,
        quantize=model.quantize,
        mesh=model.mesh,
        adapters=list(model.adapters),
    )
    return Json(found.model_dump())


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}, "description": "Metrics"}})
async def metrics(request: Request) -> Response:
    """Counts and times in Prometheus's text format."""
    return Response(service_of(request).metrics.text(), headers={"content-type": CONTENT_TYPE})


@router.get("/experts", responses={200: {"description": "Assignments per layer and expert"}})
async def experts(request: Request) -> Response:
    """How the tokens so far were spread over the experts of each layer."""
    service = service_of(request)
    service.check_ready()
    stats = service.engine.stats()
    return Json({"load": stats.expert_load, "dropped": stats.dropped})


@router.get("/v1/models", responses={200: {"model": Models}}, tags=["OpenAI"])
async def models(request: Request) -> Response:
    """The model and its adapters."""
    service = service_of(request)
    names = (service.engine.model.name, *service.engine.model.adapters)
    return Json({"object": "list", "data": [_model(name, service.created) for name in names]})


@router.get("/v1/models/{name:path}", include_in_schema=False)
async def one_model(request: Request, name: str) -> Response:
    """One of them."""
    service = service_of(request)
    if name not in (service.engine.model.name, *service.engine.model.adapters):
        raise Failure("not_found", f"no model {name[:64]!r} here")
    return Json(_model(name, service.created))


def _model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mixtral_jax"}


@functools.cache
def _page() -> tuple[str, str]:
    """The page and its policy: its own script and no other, and this server and no other."""
    text = PAGE.read_text(encoding="utf-8")
    script = text.partition("<script>")[2].partition("</script>")[0].encode("utf-8")
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode("ascii")
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
async def page() -> Response:
    """The chat page."""
    text, policy = _page()
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Response(text, headers=headers)
