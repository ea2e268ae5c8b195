"""/v1/completions: texts or token ids continued, echoed and scored."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mixtral_jax.serve.asking import Answer, Asking, ask, unless_disconnected
from mixtral_jax.serve.failures import Failure
from mixtral_jax.serve.plan import adapter_of, caller_of, openai_sampling, samples_of
from mixtral_jax.serve.request import Finished, ServeRequest, Started, TokenEvent, TokenScore
from mixtral_jax.serve.routes.headers import answer_headers, stream_headers
from mixtral_jax.serve.routes.openai import (
    Envelope,
    envelope,
    finish_reason,
    usage_of,
    wants_usage,
)
from mixtral_jax.serve.routes.route import Json, StrictRoute, answers, check_names, finite
from mixtral_jax.serve.schema.openai import Completion, CompletionRequest
from mixtral_jax.serve.service import Service, service_of
from mixtral_jax.serve.sse import DONE, EventStream, frame

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt: its ids with <s>, how many of them were added, and its text."""

    ids: list[int]
    added: int
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Prompts, ready for the engine."""

    body: CompletionRequest
    prompts: list[Prompt]
    requests: list[ServeRequest]  # best_of for each prompt
    envelope: Envelope

    @property
    def samples(self) -> int:
        """Requests per prompt."""
        return len(self.requests) // len(self.prompts)

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self.body.logprobs is not None

    @property
    def is_only_echo(self) -> bool:
        """Whether nothing is generated (max_tokens 0): the prompt is scored."""
        return self.body.max_tokens == 0

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of a request."""
        return self.prompts[index // self.samples]


@router.post("/v1/completions", responses=answers("openai", Completion, streams=True))
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continues prompts."""
    service = service_of(request)
    job = await run_in_threadpool(plan, request, body)  # a long text takes its time
    asking = await ask(service, job.requests, caller_of(request))
    known = {
        "characters": sum(len(prompt.text) for prompt in job.prompts),
        "prompt_tokens": sum(len(prompt.ids) for prompt in job.prompts),
    }
    if body.stream:
        headers = stream_headers(service, **known)
        return EventStream(_frames(job, asking), "openai", headers, on_end=asking.cancel)
    found = await unless_disconnected(request, asking.collect)
    choices = []
    for number, prompt in enumerate(job.prompts):
        samples = found[number * job.samples : (number + 1) * job.samples]
        best = sorted(samples, key=lambda answer: answer.mean_logprob, reverse=True)
        best = samples if (body.n or 1) == job.samples else best
        for answer in best[: body.n or 1]:
            choices.append(_choice(job, len(choices), prompt, answer))
    content = job.envelope.around(choices, _usage(job, found))
    return Json(content, headers=answer_headers(request, service, asking, found, **known))


def plan(request: Request, body: CompletionRequest) -> Job:
    """Checks a request and puts it into the engine's terms.

    Raises:
        Failure: it cannot be answered.
    """
    service = service_of(request)
    service.check_ready()
    check_names(request, body)
    samples = max(body.n or 1, body.best_of or 1)
    if body.best_of is not None and body.best_of < (body.n or 1):
        _refuse("best_of", f"expected at least n = {body.n}, got {body.best_of}")
    if body.stream and samples > (body.n or 1):
        _refuse("best_of", "a stream has no best; fix: drop best_of, or stream")
    if body.max_tokens == 0 and not body.echo:
        _refuse("max_tokens", "expected at least 1, or echo beside 0")
    prompts = _prompts(service, body.prompt)
    adapter, caller = adapter_of(service, body.model), caller_of(request)
    requests = []
    for prompt in prompts:
        sampling = openai_sampling(
            service,
            body,
            max_tokens=body.max_tokens,
            num_prompt=len(prompt.ids),
            top_logprobs=body.logprobs or 0,
            prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        )
        requests += samples_of(prompt.ids, sampling, samples, caller, adapter_id=adapter)
    return Job(
        body=body,
        prompts=prompts,
        requests=requests,
        envelope=envelope(service, "text_completion", "cmpl", adapter),
    )


def _prompts(service: Service, prompt: Any) -> list[Prompt]:
    """The prompts of a request: a text, texts, ids, or lists of ids."""
    if isinstance(prompt, str):
        return [_text_prompt(service, prompt)]
    if not prompt:
        _refuse("prompt", "expected a text or token ids, got an empty list")
    if isinstance(prompt[0], int):
        return [_id_prompt(service, prompt)]
    most = service.options.request.max_client_batch_size
    if len(prompt) > most:
        _refuse("prompt", f"expected at most {most} prompts, got {len(prompt)}")
    make = _text_prompt if isinstance(prompt[0], str) else _id_prompt
    return [make(service, one) for one in prompt]


def _text_prompt(service: Service, text: str) -> Prompt:
    service.check_size("prompt", [text])
    # The <s> is the model's need and no part of the text, unless it is written there.
    return Prompt(ids=service.encode(text), added=0 if text.startswith("<s>") else 1, text=text)


def _id_prompt(service: Service, ids: Sequence[int]) -> Prompt:
    """Token ids as they are, with <s> before them where it is missing."""
    if not ids:
        _refuse("prompt", "expected token ids, got an empty list")
    size = service.engine.model.vocab_size
    if max(ids) >= size:
        _refuse("prompt", f"expected token ids below {size}, got {max(ids)}")
    tokenizer = service.tokenizer
    if tokenizer is None:
        return Prompt(ids=list(ids), added=0, text="")
    added = [] if ids[0] == tokenizer.bos_id else [tokenizer.bos_id]
    known = [token_id for token_id in ids if token_id < tokenizer.vocab_size]
    return Prompt(ids=[*added, *ids], added=len(added), text=tokenizer.decode(known))


def _refuse(param: str, message: str) -> NoReturn:
    raise Failure("validation", f"{param}: {message}", param=param)


def _choice(job: Job, index: int, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    events = [] if job.is_only_echo else answer.tokens
    text = "" if job.is_only_echo else answer.end.text
    before = prompt.text if job.body.echo else ""
    logprobs = None
    if job.is_scored:
        echoed = _echoed(job, prompt, answer) if job.body.echo else []
        logprobs = _logprobs(job, [*echoed, *_generated(events, len(before))])
    return {
        "index": index,
        "text": before + text,
        "logprobs": logprobs,
        "finish_reason": "length" if job.is_only_echo else finish_reason(answer.end),
    }


class Scored(NamedTuple):
    """A token, where it begins in the text, and the best ones in its place."""

    score: TokenScore
    offset: int
    top: dict[str, float] | None


def _logprobs(job: Job, scored: Sequence[Scored]) -> dict[str, Any]:
    """OpenAI's old form: parallel lists over the tokens."""
    return {
        "tokens": [one.score.text for one in scored],
        "token_logprobs": [finite(one.score.logprob) for one in scored],
        "top_logprobs": [one.top for one in scored] if job.body.logprobs else None,
        "text_offset": [one.offset for one in scored],
    }


def _echoed(job: Job, prompt: Prompt, answer: Answer) -> list[Scored]:
    """The tokens of a prompt; None for the best in place of a first one, which nothing predicts."""
    scores = answer.prompt_scores[prompt.added :]
    tops = None if answer.started is None else answer.started.prompt_top_logprobs
    tops = [()] * len(scores) if tops is None else tops[prompt.added :]
    at, found = 0, []
    for score, top in zip(scores, tops, strict=True):
        found.append(Scored(score, at, None if score.logprob is None else _top(score, top)))
        at += _length(prompt.text, at, score)
    return found


def _length(text: str, at: int, score: TokenScore) -> int:
    """Characters of a prompt's token: SentencePiece adds spaces, ids may be no part of a text."""
    if score.byte is not None:
        return 0 if 0x80 <= score.byte < 0xC0 else 1
    shown = (score.text, score.text.removeprefix(" "))
    return next((len(piece) for piece in shown if text.startswith(piece, at)), 0)


def _generated(events: Sequence[TokenEvent], at: int) -> Iterator[Scored]:
    """Generated tokens, of which the first begins at ``at``."""
    for event in events:
        yield Scored(event.token, at, _top(event.token, event.top))
        at += len(event.piece)


def _top(token: TokenScore, top: Sequence[TokenScore]) -> dict[str, float]:
    """The best tokens by text; of two with one text the better. The chosen one is among them."""
    found: dict[str, float] = {}
    for score in (*top, token):
        logprob = finite(score.logprob)
        if logprob is not None:
            found.setdefault(score.text, logprob)
    return found


def _usage(job: Job, found: Sequence[Answer]) -> dict[str, Any]:
    usage = usage_of(found, len(job.prompts))
    if job.is_only_echo:
        usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
    return usage


async def _frames(job: Job, asking: Asking) -> AsyncGenerator[bytes, None]:
    def chunk(index: int, text: str, reason: str | None, logprobs: Any) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        usage = None if wants_usage(job.body.stream_options) else ...
        return frame(job.envelope.around([choice], usage), "openai")

    before = [len(prompt.text) if job.body.echo else 0 for prompt in job.prompts]
    offsets = [start for start in before for _ in range(job.samples)]
    async with contextlib.aclosing(asking.events()) as events:
        async for index, event in events:
            answer, prompt = asking.answers[index], job.prompt_of(index)
            if isinstance(event, Started) and job.body.echo:
                logprobs = None
                if job.is_scored:
                    logprobs = _logprobs(job, _echoed(job, prompt, answer))
                yield chunk(index, prompt.text, None, logprobs)
            elif isinstance(event, TokenEvent) and not job.is_only_echo:
                logprobs = None
                if job.is_scored:
                    logprobs = _logprobs(job, list(_generated([event], offsets[index])))
                offsets[index] += len(event.piece)
                if event.text or logprobs:
                    yield chunk(index, event.text, None, logprobs)
            elif isinstance(event, Finished):
                tail = "" if job.is_only_echo else event.tail
                reason = "length" if job.is_only_echo else finish_reason(event)
                yield chunk(index, tail, reason, None)
    if wants_usage(job.body.stream_options):
        yield frame(job.envelope.around([], _usage(job, asking.answers)), "openai")
    yield DONE
