"""/generate, /generate_stream, POST / and /invocations, as TGI answers them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mixtral_jax.serve.asking import Answer, Asking, ask, unless_disconnected
from mixtral_jax.serve.failures import Failure
from mixtral_jax.serve.plan import caller_of, samples_of, tgi_sampling
from mixtral_jax.serve.request import Finished, ServeRequest, TokenEvent, TokenScore
from mixtral_jax.serve.routes.headers import answer_headers, stream_headers
from mixtral_jax.serve.routes.route import Json, StrictRoute, answers, check_names, finite
from mixtral_jax.serve.schema.tgi import (
    CompatGenerateRequest,
    GenerateRequest,
    GenerateResponse,
)
from mixtral_jax.serve.service import Service, service_of
from mixtral_jax.serve.sse import EventStream, frame

router = APIRouter(route_class=StrictRoute, tags=["Text Generation Inference"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A request to /generate, ready for the engine."""

    body: GenerateRequest
    requests: list[ServeRequest]

    @property
    def prefix(self) -> str:
        """What comes before the generated text: the prompt, where asked for."""
        return self.body.inputs if self.body.parameters.return_full_text else ""


@router.post("/generate", responses=answers("tgi", GenerateResponse))
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Generates an answer to a prompt."""
    return Json(*await generated(request, body))


@router.post("/generate_stream", responses=answers("tgi", None, streams=True))
async def generate_stream(request: Request, body: GenerateRequest) -> Response:
    """Generates an answer to a prompt, one event per token."""
    return await streamed(request, body)


@router.post("/", responses=answers("tgi", list[GenerateResponse], streams=True))
async def compat_generate(request: Request, body: CompatGenerateRequest) -> Response:
    """/generate, or with ``stream`` /generate_stream; the answer is a list of one."""
    if body.stream:
        return await streamed(request, body)
    content, status, headers = await generated(request, body)
    return Json([content], status, headers)


async def generated(
    request: Request, body: GenerateRequest
) -> tuple[dict[str, Any], int, dict[str, str]]:
    """The whole answer, its status and its headers."""
    service = service_of(request)
    job = await run_in_threadpool(plan, request, body, is_stream=False)
    asking = await ask(service, job.requests, caller_of(request))
    found = await unless_disconnected(request, asking.collect)
    best = max(range(len(found)), key=lambda index: found[index].mean_logprob)
    answer = found.pop(best)
    content: dict[str, Any] = {"generated_text": job.prefix + answer.end.text}
    parameters = body.parameters
    if parameters.details or parameters.decoder_input_details:
        details = _details(answer)
        if found:
            details["best_of_sequences"] = [
                {"generated_text": job.prefix + other.end.text, **_details(other)}
                for other in found
            ]
        content["details"] = details
    headers = answer_headers(
        request,
        service,
        asking,
        [answer],
        characters=len(body.inputs),
        prompt_tokens=answer.end.prompt_tokens,
    )
    return content, 200, headers


async def streamed(request: Request, body: GenerateRequest) -> Response:
    """One event per token."""
    service = service_of(request)
    job = await run_in_threadpool(plan, request, body, is_stream=True)
    asking = await ask(service, job.requests, caller_of(request))
    prompt_tokens = len(job.requests[0].prompt_ids)
    headers = stream_headers(service, characters=len(body.inputs), prompt_tokens=prompt_tokens)
    return EventStream(_frames(service, job, asking), "tgi", headers, on_end=asking.cancel)


def plan(request: Request, body: GenerateRequest, *, is_stream: bool) -> Job:
    """Checks a request and puts it into the engine's terms; a long text takes its time.

    Raises:
        Failure: it cannot be answered.
    """
    service = service_of(request)
    service.check_ready()
    check_names(request, body)
    parameters = body.parameters
    if parameters.truncate is None:
        service.check_size("inputs", [body.inputs])
    prompt_ids = truncated(service.encode(body.inputs), parameters.truncate)
    sampling = tgi_sampling(service, parameters, num_prompt=len(prompt_ids), is_stream=is_stream)
    adapter = parameters.adapter_id
    if adapter is not None and adapter not in service.engine.model.adapters:
        known = ", ".join(service.engine.model.adapters) or "none on this server"
        raise Failure("validation", f"adapter_id: expected {known}, got {adapter!r}")
    count = parameters.best_of or 1
    caller = caller_of(request)
    requests = samples_of(prompt_ids, sampling, count, caller, adapter_id=adapter)
    return Job(body=body, requests=requests)


def truncated(prompt_ids: list[int], most: int | None) -> list[int]:
    """The last tokens of a prompt, after its <s>."""
    if most is None or len(prompt_ids) <= most:
        return prompt_ids
    return [prompt_ids[0], *prompt_ids[len(prompt_ids) - most + 1 :]]


async def _frames(service: Service, job: Job, asking: Asking) -> AsyncGenerator[bytes, None]:
    """One event per token; the last one also has the whole text and the details.

    A token that may be the last one waits until that is known.
    """
    sampling = job.requests[0].sampling
    eos_ids = service.engine.model.eos_ids
    is_open = bool(sampling.stop) or sampling.grammar is not None
    held: TokenEvent | None = None
    sent = 0  # characters
    async with contextlib.aclosing(asking.events()) as events:
        async for _, event in events:
            if isinstance(event, TokenEvent):
                if held is not None:
                    yield frame(_event(job, held, held.piece), "tgi")
                    sent += len(held.piece)
                held = event
                may_end = event.index + 1 >= sampling.max_new_tokens or event.token.id in eos_ids
                if not (is_open or may_end):
                    yield frame(_event(job, held, held.piece), "tgi")
                    sent += len(held.piece)
                    held = None
            elif isinstance(event, Finished):
                yield frame(_last_event(job, asking.answers[0], held, event.text[sent:]), "tgi")


def _event(job: Job, event: TokenEvent, piece: str) -> dict[str, Any]:
    """``piece``: what the token adds to the text, so that clients may join them."""
    value: dict[str, Any] = {
        "index": event.index + 1,  # TGI counts from 1
        "token": token_json(event.token, piece),
        "generated_text": None,
        "details": None,
    }
    if job.requests[0].sampling.top_logprobs:
        value["top_tokens"] = [token_json(token) for token in event.top]
    return value


def _last_event(job: Job, answer: Answer, held: TokenEvent | None, rest: str) -> dict[str, Any]:
    end = answer.end
    if held is None:
        score = TokenScore(id=0, text="", logprob=0.0, is_special=True)
        held = TokenEvent(index=len(end.token_ids), token=score, text="")
    value = _event(job, held, rest)
    value["generated_text"] = job.prefix + end.text
    value["details"] = {
        "finish_reason": end.reason,
        "generated_tokens": len(end.token_ids),
        "input_length": end.prompt_tokens,
        "seed": _seed(answer),
    }
    return value


def token_json(token: TokenScore, piece: str | None = None) -> dict[str, Any]:
    """A generated token; ``piece`` is what it adds to the text, where that is known."""
    return {
        "id": token.id,
        "text": _shown(token) if piece is None or token.is_special else piece,
        "logprob": finite(token.logprob),
        "special": token.is_special,
    }


def _shown(token: TokenScore) -> str:
    """A token by itself: a byte of a longer character is U+FFFD, as in TGI."""
    return token.text if token.byte is None else bytes([token.byte]).decode("utf-8", "replace")


def _details(answer: Answer) -> dict[str, Any]:
    end = answer.end
    details: dict[str, Any] = {
        "finish_reason": end.reason,
        "generated_tokens": len(end.token_ids),
        "seed": _seed(answer),
        "prefill": [
            {"id": score.id, "text": _shown(score), "logprob": finite(score.logprob)}
            for score in answer.prompt_scores
        ],
        "tokens": [token_json(event.token, event.piece) for event in answer.tokens],
    }
    if answer.request.sampling.top_logprobs:
        details["top_tokens"] = [
            [token_json(token) for token in event.top] for event in answer.tokens
        ]
    return details


def _seed(answer: Answer) -> int | None:
    return None if answer.request.sampling.temperature == 0 else answer.end.seed
