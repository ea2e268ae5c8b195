"""What the device is asked, and how the engine ends when the device does not answer."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import get_args

import numpy as np

from mixtral_jax.model.placement import LOCAL
from mixtral_jax.serve import commands, engine, programs
from mixtral_jax.serve.device import Device, warm
from tests.serve.conftest import SMALL
from tests.serve.requests import answer, failure, finished
from tests.serve.test_engine import is_idle, request, wait_until


def test_expert_load_counts_what_was_cancelled(small_engine, small_lm):
    def load():
        return np.asarray(small_engine.stats().expert_load)

    before = load()
    ticket = small_engine.submit(request(21, max_new_tokens=400, ignore_eos=True))
    next(ticket.iterate())
    ticket.cancel()
    assert failure(ticket).kind == "cancelled"
    assert wait_until(lambda: is_idle(small_engine))
    chosen = (load() - before).sum(axis=1)
    assert (chosen >= 21 * small_lm.config.num_experts_per_tok).all()


def test_a_row_that_ended_costs_its_neighbours_nothing(small_engine, monkeypatch):
    """What it asked of the sampler is asked no more."""
    asked = {"temperature": 1.0, "typical_p": 0.5, "logit_bias": ((5, 1.0),), "top_logprobs": 3}
    sampled = request(8, max_new_tokens=30, ignore_eos=True, **asked)
    for ticket in [small_engine.submit(sampled) for _ in range(3)]:
        finished(ticket)
    seen, step = [], programs.step

    def spy(model, pool, rows, *args, **kwargs):
        seen.append(rows)
        return step(model, pool, rows, *args, **kwargs)

    monkeypatch.setattr(programs, "step", spy)
    answer(small_engine, request(8, max_new_tokens=3, ignore_eos=True, top_k=7))
    assert seen
    for rows in seen:
        assert not rows.sampling.temperature.any()
        assert not rows.bias_values.any()
        assert not rows.wants_best.any()
        assert (rows.typical_p == 1).all()
        assert (rows.sampling.top_k == 7).sum() == 1  # the options of the row that runs


def test_every_program_is_made_before_it_is_ready(small_engine, small_lm):
    device = Device(small_lm.model, LOCAL, small_engine._plan)
    sent: list[commands.Command] = []
    warm(device, sent.append)
    reads = [c for c in sent if isinstance(c, commands.Read)]
    assert {(c.targets is not None, c.wants_best) for c in reads} == {
        (False, False),
        (True, False),
        (True, True),
    }
    assert {type(c) for c in sent} == set(get_args(commands.Command)) - {commands.Stop}


def test_prompts_that_begin_alike_are_read_once(make_engine, small_lm, small_engine):
    engine = make_engine(small_lm, dataclasses.replace(SMALL, prefix_cache_bytes=1 << 20))
    fields = {"max_new_tokens": 6, "temperature": 1.0, "ignore_eos": True}
    asked = [request(100, **fields, sample_id=i) for i in range(4)]
    asked.append(dataclasses.replace(asked[0], prompt_ids=(*asked[0].prompt_ids[:40], 7, 8)))
    asked.append(request(100, **fields, prompt_logprobs=True))
    with engine._changed:  # all are admitted in one turn, but for the last
        tickets = [engine.submit(each) for each in asked]
    ends = [finished(ticket) for ticket in tickets]
    for each, last in zip(asked, ends, strict=True):
        assert last.token_ids == answer(small_engine, each).token_ids
    assert sorted(last.cached_tokens for last in ends) == [0, 0, 32, 96, 96, 96]
    read = engine.stats().counters["prefill_tokens"]
    assert read == sum(len(each.prompt_ids) - 1 for each in asked) - 32 - 3 * 96


def test_closing_does_not_wait_for_a_device_that_hangs(make_engine, small_lm, monkeypatch):
    stuck = make_engine(small_lm)
    ticket = stuck.submit(request(8, max_new_tokens=400, ignore_eos=True))
    next(ticket.iterate())
    is_hanging, goes_on, execute = threading.Event(), threading.Event(), Device.execute

    def hang(self, command):
        is_hanging.set()
        goes_on.wait(60)
        return execute(self, command)

    monkeypatch.setattr(Device, "execute", hang)
    monkeypatch.setattr(engine, "END_SECONDS", 0.2)
    try:
        assert is_hanging.wait(10)
        started = time.monotonic()
        stuck.close()
        stuck.close()
        assert time.monotonic() - started < 5
        assert failure(ticket).kind == "unavailable"
        assert stuck.state() == "failed"
        assert not stuck.has_ended
    finally:
        goes_on.set()
    assert wait_until(lambda: stuck.has_ended)
