"""Running requests on the engine: submitted together, read together, cancelled together."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

from starlette.requests import Request

from mixtral_jax.serve.failures import Failure, Kind
from mixtral_jax.serve.plan import Caller
from mixtral_jax.serve.request import (
    Event,
    Failed,
    Finished,
    Refused,
    ServeRequest,
    Started,
    Ticket,
    TokenEvent,
    TokenScore,
)
from mixtral_jax.serve.service import Service

Value = TypeVar("Value")

_KINDS: dict[str, Kind] = {
    "generation": "generation",
    "overloaded": "overloaded",
    "unavailable": "unhealthy",
    "invalid": "validation",
    "cancelled": "unhealthy",  # by the engine: a client that cancels reads no answer
}


class DisconnectedError(Exception):
    """The client left."""


class Indexed(NamedTuple):
    """An event, and which of the requests it belongs to."""

    index: int
    event: Event


@dataclasses.dataclass
class Answer:
    """What one request has given so far."""

    request: ServeRequest
    started: Started | None = None
    tokens: list[TokenEvent] = dataclasses.field(default_factory=list)
    finished: Finished | None = None

    def take(self, event: Event) -> None:
        """Takes the next event."""
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, TokenEvent):
            self.tokens.append(event)
        elif isinstance(event, Finished):
            self.finished = event

    @property
    def end(self) -> Finished:
        """The end; only once there is one."""
        assert self.finished is not None
        return self.finished

    @property
    def prompt_scores(self) -> Sequence[TokenScore]:
        """Scores of the prompt's tokens, where asked for."""
        return (self.started.prompt_logprobs or ()) if self.started else ()

    @property
    def mean_logprob(self) -> float:
        """How probable the answer is, per token."""
        logprobs = self.end.logprobs
        return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


class Asking:
    """Requests of one HTTP request, running on the engine.

    Args:
        service: whose engine.
        requests: what was asked.
        tickets: what the engine gave for them.
        caller: who asks.
    """

    def __init__(
        self,
        service: Service,
        requests: Sequence[ServeRequest],
        tickets: Sequence[Ticket],
        caller: Caller,
    ):
        self._service = service
        self._caller = caller
        self._tickets = tickets
        self.answers = [Answer(request) for request in requests]
        self.started_at, self.submitted_at = time.time(), time.perf_counter()
        self._deadline = time.monotonic() + service.options.http.request_timeout

    def cancel(self) -> None:
        """Frees what still runs."""
        for ticket, answer in zip(self._tickets, self.answers, strict=True):
            if answer.finished is None:
                ticket.cancel()

    async def events(self) -> AsyncGenerator[Indexed, None]:
        """The events of all requests as they come. Whatever ends this cancels what still runs.

        Raises:
            Failure: one of the requests failed, or the time is up.
        """
        queue: asyncio.Queue[Indexed | Exception] = asyncio.Queue()
        readers = [
            asyncio.create_task(self._read(index, ticket, queue))
            for index, ticket in enumerate(self._tickets)
        ]
        running = len(readers)
        try:
            while running:
                item = await self._next(queue)
                if isinstance(item, Exception):
                    raise item
                self.answers[item.index].take(item.event)
                if isinstance(item.event, Failed):
                    raise _failure(item.event)
                running -= isinstance(item.event, Finished)
                yield item
            self._tell()
        finally:
            self.cancel()
            for reader in readers:
                reader.cancel()

    def _tell(self) -> None:
        """Counts, traces and logs whole answers."""
        service, ends = self._service, [answer.end for answer in self.answers]
        service.metrics.finished(self.answers)
        service.tracing.finished(self.answers, self.started_at, self._caller.traceparent)
        self._caller.log.update(
            answers=len(ends),
            prompt_tokens=sum(end.prompt_tokens for end in ends),
            cached_tokens=sum(end.cached_tokens for end in ends),
            generated_tokens=sum(len(end.token_ids) for end in ends),
            finish_reason=",".join(dict.fromkeys(end.reason for end in ends)),
            queue_seconds=max(end.queue_seconds for end in ends),
            prefill_seconds=max(end.prefill_seconds for end in ends),
            decode_seconds=max(end.decode_seconds for end in ends),
        )
        if service.options.watch.log_prompts:
            prompts = [list(answer.request.prompt_ids) for answer in self.answers]
            known = service.tokenizer
            texts = prompts if known is None else [known.decode(ids) for ids in prompts]
            self._caller.log.update(prompts=texts, texts=[end.text for end in ends])

    async def _next(self, queue: asyncio.Queue[Indexed | Exception]) -> Indexed | Exception:
        left = self._deadline - time.monotonic()
        try:
            if left <= 0:  # whatever is there: a slow reader has no more time than others
                raise TimeoutError
            # Not wait_for: before Python 3.12 it can swallow a cancellation (the client left).
            async with asyncio.timeout(left):
                return await queue.get()
        except TimeoutError:
            seconds = self._service.options.http.request_timeout
            raise Failure("timeout", f"the answer took more than {seconds:g} s") from None

    @staticmethod
    async def _read(index: int, ticket: Ticket, queue: asyncio.Queue[Indexed | Exception]) -> None:
        ended = False
        try:
            async for event in ticket.events():
                ended = isinstance(event, Finished | Failed)
                queue.put_nowait(Indexed(index, event))
            if not ended:
                queue.put_nowait(Failure("generation", "the answer broke off"))
        except Exception as error:
            queue.put_nowait(error)

    async def collect(self) -> list[Answer]:
        """All answers, once they are whole.

        Raises:
            Failure: one of them failed, or the time is up.
        """
        async with contextlib.aclosing(self.events()) as events:
            async for _ in events:
                pass
        return self.answers


async def ask(service: Service, requests: Sequence[ServeRequest], caller: Caller) -> Asking:
    """Submits requests to the engine: all of them, or none.

    Raises:
        Failure: the engine refuses one, or would never have room for all of them.
    """
    service.check_ready()
    most = service.engine.limits.max_concurrent_requests
    if len(requests) > most:
        message = f"expected at most {most} answers at one time, got {len(requests)}"
        raise Failure("validation", f"{message}; fix: fewer prompts, n or best_of", param="n")
    tickets: list[Ticket] = []
    try:
        for request in requests:
            # Compiling a grammar takes a while; the loop has others to serve.
            if request.sampling.grammar is not None:
                tickets.append(await asyncio.to_thread(service.engine.submit, request))
            else:
                tickets.append(service.engine.submit(request))
    except BaseException as error:
        for ticket in tickets:
            ticket.cancel()
        if isinstance(error, Refused):
            raise _refusal(error) from None
        raise
    service.metrics.validation.observe(time.perf_counter() - caller.received_at)
    return Asking(service, requests, tickets, caller)


def _refusal(error: Refused) -> Failure:
    retry = error.retry_seconds if error.kind in ("overloaded", "unavailable") else None
    return Failure(_KINDS[error.kind], error.message, retry_seconds=retry)


def _failure(event: Failed) -> Failure:
    return Failure(_KINDS[event.kind], event.message)


async def unless_disconnected(request: Request, work: Callable[[], Awaitable[Value]]) -> Value:
    """The result of some work, which is cancelled when the client leaves.

    Raises:
        DisconnectedError: it left.
    """
    task = asyncio.ensure_future(work())
    watcher = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise DisconnectedError
        return task.result()
    finally:
        for future in (task, watcher):
            future.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
