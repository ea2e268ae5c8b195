"""An engine without a model: answers are scripted, everything around them is real.

It keeps the contract of EngineProtocol: events in order, exactly one end, refusals at once, a slot
freed by an end or a cancellation. Text, stop strings and token pieces come from the real tokenizer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from mixtral_jax.decode.text import TextStream
from mixtral_jax.serve.options import HttpFlags, RequestFlags, ServeOptions
from mixtral_jax.serve.request import (
    EngineLimits,
    EngineState,
    EngineStats,
    Event,
    Failed,
    FailureKind,
    Finished,
    Histogram,
    ModelFacts,
    Refused,
    ServeRequest,
    Started,
    TokenEvent,
    TokenScore,
)
from mixtral_jax.tokenizer import Tokenizer

MANY = 10_000


def options(**fields: Any) -> ServeOptions:
    """Server options: HTTP flags by name, request flags in ``request``."""
    request = RequestFlags(**fields.pop("request", {}))
    return ServeOptions(http=HttpFlags(**fields), request=request)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
    """One answer.

    Attributes:
        token_ids: what is generated, unless the request ends it before; </s> has to be among them
            to count as an end.
        delay: seconds before each token.
        fails_after: tokens before it fails; never, if None.
        kind: how it fails.
    """

    token_ids: Sequence[int]
    delay: float = 0.0
    fails_after: int | None = None
    kind: FailureKind = "generation"
    logprob: float = -0.5


class FakeTicket:
    """A request that runs by its script."""

    def __init__(self, engine: FakeEngine, request: ServeRequest, script: Script):
        self.request = request
        self.script = script
        self.is_cancelled = False
        self.made = 0  # tokens so far
        self.is_done = False
        self._engine = engine
        self._failure: Failed | None = None

    def cancel(self) -> None:
        self.is_cancelled = True
        self.fail("cancelled")

    def fail(self, kind: FailureKind) -> None:
        self._failure = self._failure or Failed(kind=kind, message=f"scripted: {kind}")
        self._engine.release(self)

    async def events(self) -> AsyncIterator[Event]:
        for event in self._events():
            if self._failure is not None:
                yield self._failure
                return
            yield event
            if isinstance(event, Failed | Finished):
                self._engine.release(self)
                return
            # A token takes its time, the end comes with the last one.
            is_last = isinstance(event, TokenEvent) and self.is_done
            await asyncio.sleep(0 if is_last else self.script.delay)

    def iterate(self) -> Iterator[Event]:
        yield from self._events()
        self._engine.release(self)

    def _top(self, token_id: int) -> tuple[TokenScore, ...]:
        best = [self._score(token_id + n) for n in range(self.request.sampling.top_logprobs)]
        return tuple(dataclasses.replace(s, logprob=-0.5 - n) for n, s in enumerate(best))

    def _events(self) -> Iterator[Event]:
        sampling, tokenizer = self.request.sampling, self._engine.tokenizer
        prompt = () if self.request.is_answer else self.request.prompt_ids
        stream = TextStream(tokenizer, prompt, sampling.stop)
        scores = tops = None
        if sampling.prompt_logprobs:
            known = [self._score(token_id) for token_id in self.request.prompt_ids]
            scores = (dataclasses.replace(known[0], logprob=None), *known[1:])
            if sampling.top_logprobs:
                tops = ((), *(self._top(score.id) for score in scores[1:]))
        yield Started(queue_seconds=0.001, prompt_logprobs=scores, prompt_top_logprobs=tops)
        made: list[int] = []
        reason = None
        for token_id in self.script.token_ids:
            if self.script.fails_after is not None and len(made) >= self.script.fails_after:
                yield Failed(kind=self.script.kind, message=f"scripted: {self.script.kind}")
                return
            made.append(token_id)
            self.made = len(made)
            is_end = token_id == tokenizer.eos_id and not sampling.ignore_eos
            text = "" if is_end else stream.push(token_id)
            piece = "" if is_end else stream.piece
            top = self._top(token_id)
            self.is_done = is_end or stream.is_stopped or len(made) >= sampling.max_new_tokens
            token = self._score(token_id)
            yield TokenEvent(index=len(made) - 1, token=token, text=text, piece=piece, top=top)
            if self.is_done:
                reason = "eos_token" if is_end else "length"
                reason = "stop_sequence" if stream.is_stopped else reason
                break
        assert reason is not None, "the script is too short for this request"
        tail = stream.flush()
        yield Finished(
            reason=reason,
            text=stream.text + (stream.stopped_by if sampling.include_stop else ""),
            token_ids=tuple(made),
            logprobs=(self.script.logprob,) * len(made),
            tail=tail,
            seed=sampling.seed,
            prefill_seconds=0.002,
            decode_seconds=0.003,
            queue_seconds=0.001,
            prompt_tokens=len(self.request.prompt_ids),
            cached_tokens=0,
        )

    def _score(self, token_id: int) -> TokenScore:
        tokenizer = self._engine.tokenizer
        token_id %= tokenizer.vocab_size
        is_special = tokenizer.is_control(token_id)
        text = tokenizer.pieces[token_id] if is_special else tokenizer.text_of(token_id)
        return TokenScore(
            id=token_id,
            text=text,
            logprob=self.script.logprob,
            is_special=is_special,
            byte=tokenizer.byte_of(token_id),
        )


class FakeEngine:
    """An engine whose answers a test writes.

    Args:
        tokenizer: of the imagined model.
        script: the answer to a request; unless given, the end of the prompt is repeated.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        script: Callable[[ServeRequest], Script] | None = None,
        *,
        adapters: tuple[str, ...] = (),
        max_concurrent: int = 128,
        max_total_tokens: int = 512,
    ):
        self.tokenizer = tokenizer
        self.script = script or self.repeat
        self.limits = EngineLimits(
            max_input_tokens=max_total_tokens - 1,
            max_total_tokens=max_total_tokens,
            max_batch_prefill_tokens=4096,
            max_batch_total_tokens=8192,
            max_concurrent_requests=max_concurrent,
        )
        self.model = ModelFacts(
            name="fake",
            digest="abc",
            dtype="float32",
            quantize=None,
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=512,
            eos_ids=(tokenizer.eos_id,),
            adapters=adapters,
            is_v3=tokenizer.version == "v3",
        )
        self.tickets: list[FakeTicket] = []
        self.running: set[FakeTicket] = set()
        self._state: EngineState = "ready"
        self._lock = threading.Lock()

    def say(self, text: str, **fields: object) -> Callable[[ServeRequest], Script]:
        """A script for every request: a text, then </s>."""
        ids = [*self.tokenizer.encode(text, bos=False), self.tokenizer.eos_id]
        self.script = lambda request: Script(token_ids=ids, **fields)  # type: ignore[arg-type]
        return self.script

    def repeat(self, request: ServeRequest) -> Script:
        """The prompt again (less <s>), then </s>, then the same without end."""
        ids = [i for i in request.prompt_ids if not self.tokenizer.is_control(i)]
        return Script(token_ids=[*ids, self.tokenizer.eos_id] * (MANY // (len(ids) + 1)))

    def submit(self, request: ServeRequest) -> FakeTicket:
        with self._lock:
            if self._state != "ready":
                raise Refused("unavailable", f"the model is {self._state}")
            if len(self.running) >= self.limits.max_concurrent_requests:
                raise Refused("overloaded", "the queue is full", retry_seconds=2.5)
            if request.sampling.grammar is not None and request.sampling.grammar.text == "(":
                raise Refused("invalid", "grammar: no regular expression")
            ticket = FakeTicket(self, request, self.script(request))
            self.tickets.append(ticket)
            self.running.add(ticket)
            return ticket

    def release(self, ticket: FakeTicket) -> None:
        with self._lock:
            self.running.discard(ticket)

    def state(self) -> EngineState:
        return self._state

    def set_state(self, state: EngineState) -> None:
        self._state = state

    def die(self) -> None:
        self._state = "failed"
        for ticket in list(self.running):
            ticket.fail("unavailable")

    def stats(self) -> EngineStats:
        times = 1 + len(self.tickets)
        return EngineStats(
            counters={
                "generated_tokens": 7,
                "compilations_since_ready": 0,
                "prefill_calls": 2,
                "decode_calls": 5,
            },
            gauges={"queue_size": 3, "batch_size": len(self.running), "prefix_cache_bytes": 64.0},
            histograms={
                "decode_call_seconds": Histogram(bounds=(0.1, 1.0), counts=(1, 2), count=3, sum=4.5)
            },
            expert_load=tuple(
                tuple(n * times for n in row) for row in ((1, 2, 3, 4), (4, 3, 2, 1))
            ),
            dropped=(0, 5),
        )

    def drain(self, seconds: float) -> bool:
        self._state = "draining"
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            time.sleep(0.005)
        return not self.running

    def close(self) -> None:
        self.die()
