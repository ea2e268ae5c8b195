"""Requests of many kinds, and what became of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mixtral_jax.serve.engine import Engine
from mixtral_jax.serve.request import (
    Event,
    Failed,
    Finished,
    ServeRequest,
    ServeSampling,
    Started,
    Ticket,
    TokenEvent,
)


def mixed_request(rng: random.Random, vocab: int, longest: int = 300, **fields) -> ServeRequest:
    """Greedy or seeded, short or long, with options that vary."""
    length = rng.choice([1, 2, rng.randint(3, 40), rng.randint(40, longest)])
    options: dict = {"max_new_tokens": rng.randint(1, 40), "ignore_eos": rng.random() < 0.7}
    if rng.random() < 0.6:
        options |= {
            "temperature": rng.choice([0.3, 1.0, 2.5]),
            "seed": rng.choice([rng.randrange(2**32), rng.randrange(2**64)]),
            "top_k": rng.choice([None, 5, 40]),
            "top_p": rng.choice([None, 0.7]),
            "min_p": rng.choice([None, 0.05]),
            "typical_p": rng.choice([None, None, 0.8]),
            "sample_id": rng.choice([0, 0, 3]),
        }
    if rng.random() < 0.4:
        options |= {
            "repetition_penalty": rng.choice([1.0, 1.3]),
            "frequency_penalty": rng.choice([0.0, 0.7]),
            "presence_penalty": rng.choice([0.0, -0.5]),
            "logit_bias": rng.choice([(), ((5, 3.0), (vocab - 1, -50.0))]),
            "top_logprobs": rng.choice([0, 3, 20]),
        }
    ids = tuple(rng.randrange(3, vocab) for _ in range(length))
    return ServeRequest(prompt_ids=ids, sampling=ServeSampling(**(options | fields)))


def finished(ticket: Ticket) -> Finished:
    """The end of a request that must not fail; checks the order of its events."""
    events = list(ticket.iterate())
    last = events[-1]
    assert isinstance(last, Finished), last
    check_events(events, last)
    return last


def check_events(events: Sequence[Event], last: Finished) -> None:
    started, *tokens, _ = events
    assert isinstance(started, Started)
    shown, ids = "", []
    for index, event in enumerate(tokens):
        assert isinstance(event, TokenEvent)
        assert event.index == index
        shown += event.text
        ids.append(event.token.id)
    assert ids == list(last.token_ids)
    assert len(last.logprobs) == len(last.token_ids)
    assert shown + last.tail == last.text


def failure(ticket: Ticket) -> Failed:
    """The end of a request that must fail."""
    last = list(ticket.iterate())[-1]
    assert isinstance(last, Failed), last
    return last


def answer(engine: Engine, request: ServeRequest) -> Finished:
    """The answer to a request alone."""
    return finished(engine.submit(request))
