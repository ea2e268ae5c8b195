"""/v1/chat/completions: conversations in the model's own format, with tools where it has them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from mixtral_jax.chat import encode_chat
from mixtral_jax.errors import MixtralError
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
from mixtral_jax.serve.schema.openai import ChatCompletion, ChatRequest
from mixtral_jax.serve.service import Service, service_of
from mixtral_jax.serve.sse import DONE, EventStream, frame
from mixtral_jax.serve.tool_calls import MARK, Choice, choice_of, read_calls

router = APIRouter(route_class=StrictRoute, tags=["OpenAI"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A conversation, ready for the engine."""

    body: ChatRequest
    requests: list[ServeRequest]
    choice: Choice
    mark_id: int | None
    envelope: Envelope


@router.post("/v1/chat/completions", responses=answers("openai", ChatCompletion, streams=True))
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answers a conversation."""
    service = service_of(request)
    job = await run_in_threadpool(plan, request, body)  # a long text takes its time
    asking = await ask(service, job.requests, caller_of(request))
    characters = sum(map(len, _texts(body.messages)))
    known = {"characters": characters, "prompt_tokens": len(job.requests[0].prompt_ids)}
    if body.stream:
        headers = stream_headers(service, **known)
        return EventStream(_frames(job, asking), "openai", headers, on_end=asking.cancel)
    found = await unless_disconnected(request, asking.collect)
    choices = [_choice(job, index, answer) for index, answer in enumerate(found)]
    content = job.envelope.around(choices, usage_of(found))
    return Json(content, headers=answer_headers(request, service, asking, found, **known))


def plan(request: Request, body: ChatRequest) -> Job:
    """Checks a request and puts it into the engine's terms.

    Raises:
        Failure: it cannot be answered.
    """
    service = service_of(request)
    service.check_ready()
    check_names(request, body)
    if body.top_logprobs is not None and not body.logprobs:
        message = "top_logprobs: expected logprobs beside it; fix: logprobs true"
        raise Failure("validation", message, param="top_logprobs")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        message = "max_completion_tokens: another name of max_tokens; fix: give one of them"
        raise Failure("validation", message, param="max_completion_tokens")
    model = service.engine.model
    choice = choice_of(body, is_v3=model.is_v3)
    prompt_ids = chat_ids(service, body.messages, choice.tools)
    mark_id = service.text_tokenizer().control_ids.get(MARK) if choice.may_call else None
    if choice.is_forced:
        if body.response_format is not None and body.response_format.type != "text":
            message = "response_format: a forced tool call has a form of its own; fix: drop one"
            raise Failure("validation", message, param="response_format")
        assert mark_id is not None  # a v3 tokenizer has it
        prompt_ids = [*prompt_ids, mark_id]
    sampling = openai_sampling(
        service,
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        num_prompt=len(prompt_ids),
        top_logprobs=body.top_logprobs or 0,
        grammar=choice.grammar,
    )
    # A message that goes on keeps the space before its next word.
    is_open = _is_open(body.messages)
    adapter = adapter_of(service, body.model)
    count, caller = body.n or 1, caller_of(request)
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    return Job(
        body=body,
        requests=samples_of(
            prompt_ids, sampling, count, caller, adapter_id=adapter, is_answer=not is_open
        ),
        choice=choice,
        mark_id=mark_id,
        envelope=envelope(service, kind, "chatcmpl", adapter),
    )


def chat_ids(
    service: Service, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]]
) -> list[int]:
    """Token ids of a conversation. A last message of the assistant is continued.

    Raises:
        Failure: it cannot be encoded.
    """
    tokenizer = service.text_tokenizer()
    is_open = _is_open(messages)
    service.check_size("messages", _texts(messages))
    try:
        return encode_chat(tokenizer, messages, tools=tools or None, continue_final_message=is_open)
    except MixtralError as error:
        raise Failure("template_error", str(error), param="messages") from None


def _is_open(messages: Sequence[dict[str, Any]]) -> bool:
    return messages[-1].get("role") == "assistant"


def _texts(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The texts of messages, whole or in parts."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text


def _choice(job: Job, index: int, answer: Answer) -> dict[str, Any]:
    calls = _calls(job, answer)
    message: dict[str, Any] = {"role": "assistant", "content": answer.end.text}
    if calls is not None:
        message = {"role": "assistant", "content": None, "tool_calls": calls}
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(job, answer.tokens),
        "finish_reason": "tool_calls" if calls is not None else finish_reason(answer.end),
    }


def _calls(job: Job, answer: Answer) -> list[dict[str, Any]] | None:
    """The calls of an answer, or None if it is text; calls cut off by the length are text too."""
    if not _is_call(job, answer):
        return None
    return read_calls(answer.end.text)


def _is_call(job: Job, answer: Answer) -> bool:
    if job.choice.is_forced:
        return True
    first = answer.tokens[0].token.id if answer.tokens else None
    return job.choice.may_call and first == job.mark_id


def _logprobs(job: Job, events: Sequence[TokenEvent]) -> dict[str, Any] | None:
    if not job.body.logprobs:
        return None
    content = [
        {**_scored(event.token), "top_logprobs": [_scored(token) for token in event.top]}
        for event in events
    ]
    return {"content": content, "refusal": None}


def _scored(token: TokenScore) -> dict[str, Any]:
    logprob = finite(token.logprob)
    is_part = token.byte is not None
    return {
        "token": token.text,
        "logprob": -9999.0 if logprob is None else logprob,
        "bytes": [token.byte] if is_part else list(token.text.encode("utf-8")),
    }


async def _frames(job: Job, asking: Asking) -> AsyncGenerator[bytes, None]:
    def chunk(index: int, delta: dict[str, Any], reason: str | None, logprobs: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        # With include_usage every chunk but the last says that it has none yet.
        usage = None if wants_usage(job.body.stream_options) else ...
        return frame(job.envelope.around([choice], usage), "openai")

    async with contextlib.aclosing(asking.events()) as events:
        async for index, event in events:
            answer = asking.answers[index]
            if isinstance(event, Started):
                yield chunk(index, {"role": "assistant", "content": ""}, None, None)
            elif isinstance(event, TokenEvent):
                # Calls are sent whole: half of one is of no use.
                text = "" if _is_call(job, answer) else event.text
                logprobs = _logprobs(job, [event])
                if text or logprobs:
                    yield chunk(index, {"content": text}, None, logprobs)
            elif isinstance(event, Finished):
                calls = _calls(job, answer)
                rest = event.text if _is_call(job, answer) else event.tail
                if calls is not None:
                    numbered = [{"index": i, **call} for i, call in enumerate(calls)]
                    yield chunk(index, {"tool_calls": numbered}, None, None)
                elif rest:
                    yield chunk(index, {"content": rest}, None, None)
                reason = "tool_calls" if calls is not None else finish_reason(event)
                yield chunk(index, {}, reason, None)
    if wants_usage(job.body.stream_options):
        yield frame(job.envelope.around([], usage_of(asking.answers)), "openai")
    yield DONE
