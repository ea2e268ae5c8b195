"""The engine on a small random model: what it answers, whoever else it serves."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import threading
import time

import numpy as np
import pytest

from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.serve import commands
from mixtral_jax.serve.device import Device
from mixtral_jax.serve.engine import Engine
from mixtral_jax.serve.request import Failed, Finished, Refused, ServeRequest, ServeSampling
from tests.serve.conftest import SMALL
from tests.serve.requests import answer, failure, finished, mixed_request
from tests.slow import mostly_slow

V = 64
LOGPROB_TOLERANCE = 2e-5


def request(length: int, *, prompt: int = 0, **fields) -> ServeRequest:
    ids = np.random.default_rng(prompt).integers(3, V, length)
    return ServeRequest(prompt_ids=tuple(ids.tolist()), sampling=ServeSampling(**fields))


def is_idle(engine) -> bool:
    gauges = engine.stats().gauges
    return gauges["slots_in_use"] == gauges["queue_size"] == gauges["batch_size"] == 0


def wait_until(check, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not check() and time.monotonic() < until:
        time.sleep(0.01)
    return check()


def run_mixed(engine, number: int, seed: int) -> None:
    """Answers under concurrency, with joins, leaves and cancellations, equal those alone."""
    rng = random.Random(seed)
    wanted = [mixed_request(rng, V) for _ in range(number)]
    alone = [answer(engine, each) for each in wanted]
    order = list(range(number))
    rng.shuffle(order)
    tickets, noise = {}, []
    for i in order:
        tickets[i] = engine.submit(wanted[i])
        if rng.random() < 0.3:
            noise.append(engine.submit(mixed_request(rng, V, ignore_eos=True)))
        if noise and rng.random() < 0.5:
            noise.pop(0).cancel()
        if rng.random() < 0.3:
            time.sleep(0.01)
    for i, ticket in tickets.items():
        together = finished(ticket)
        assert together.token_ids == alone[i].token_ids, (seed, i, wanted[i])
        # How many rows share an expert picks its branch, so the last bit may differ.
        np.testing.assert_allclose(together.logprobs, alone[i].logprobs, atol=LOGPROB_TOLERANCE)
        assert together.reason == alone[i].reason
    for ticket in noise:
        ticket.cancel()
        list(ticket.iterate())
    assert wait_until(lambda: is_idle(engine))


def test_answers_under_concurrency_equal_those_alone(small_engine):
    run_mixed(small_engine, 20, seed=1)
    assert max(small_engine.stats().histograms["batch_size"].counts) > 0


@pytest.mark.slow
def test_64_answers_under_concurrency_equal_those_alone(small_engine):
    for seed in range(5):
        run_mixed(small_engine, 64, seed=seed)


@pytest.mark.parametrize("length", mostly_slow([1, 16, 17, 100], [17]))
def test_the_server_and_the_library_agree(small_engine, small_lm, length):
    """Equal options, equal tokens: chunks and batches differ, numbers do not."""
    for fields in (
        {},
        {"temperature": 1.3, "seed": 7, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.8, "seed": 2**32 - 1, "repetition_penalty": 1.2},
    ):
        asked = request(length, max_new_tokens=20, **fields)
        options = SamplingOptions(max_new_tokens=20, **fields)
        theirs = small_lm.generate(prompt_token_ids=[asked.prompt_ids], options=options)[0]
        ours = answer(small_engine, asked)
        assert list(ours.token_ids) == theirs.token_ids
        assert ours.reason == theirs.finish_reason
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=LOGPROB_TOLERANCE)


def test_seeds_have_64_bits(small_engine):
    def tokens(seed: int, sample_id: int = 0):
        fields = {"temperature": 2.0, "seed": seed, "sample_id": sample_id}
        return answer(small_engine, request(5, max_new_tokens=12, **fields)).token_ids

    seen = {tokens(seed) for seed in (3, 3 + 2**32, 3 + 2**33, 2**64 - 1)} | {tokens(3, 1)}
    assert len(seen) == 5
    assert tokens(3 + 2**32) in seen


def test_scores_are_those_of_teacher_forcing(small_engine, small_lm):
    asked = request(45, max_new_tokens=9, ignore_eos=True, prompt_logprobs=True, top_logprobs=5)
    started, *tokens, last = small_engine.submit(asked).iterate()
    whole = [*asked.prompt_ids, *last.token_ids]
    logits = small_lm.logits([whole])[0]
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))[:, None]
    logprobs -= logits.max(-1, keepdims=True)
    expected = [logprobs[i, token] for i, token in enumerate(whole[1:])]
    prompt = started.prompt_logprobs
    assert [score.id for score in prompt] == list(asked.prompt_ids)
    assert prompt[0].logprob is None
    got = [score.logprob for score in prompt[1:]] + list(last.logprobs)
    np.testing.assert_allclose(got, expected, atol=LOGPROB_TOLERANCE)
    assert started.prompt_top_logprobs[0] == ()  # nothing predicts a first token
    tops = [*started.prompt_top_logprobs[1:], *(event.top for event in tokens)]
    assert len(tops) == len(whole) - 1
    for top, row in zip(tops, logprobs, strict=False):
        assert len(top) == 5
        ids = [score.id for score in top]
        np.testing.assert_allclose(
            [score.logprob for score in top], np.sort(row)[::-1][:5], atol=LOGPROB_TOLERANCE
        )
        np.testing.assert_allclose(row[ids], np.sort(row)[::-1][:5], atol=LOGPROB_TOLERANCE)
    assert answer(small_engine, dataclasses.replace(asked)).token_ids == last.token_ids


def test_a_cancelled_request_frees_its_slot(small_engine):
    keeps = small_engine.submit(request(8, max_new_tokens=60, ignore_eos=True))
    gone = [
        small_engine.submit(request(400, prompt=i, max_new_tokens=100, ignore_eos=True))
        for i in range(12)
    ]
    running = small_engine.submit(request(4, max_new_tokens=100, ignore_eos=True))
    next(running.iterate())
    for ticket in (*gone, running):
        ticket.cancel()
        ticket.cancel()
    for ticket in gone:
        assert failure(ticket).kind == "cancelled"
    assert len(finished(keeps).token_ids) == 60
    assert wait_until(lambda: is_idle(small_engine))
    again = answer(small_engine, request(8, max_new_tokens=60, ignore_eos=True))
    assert len(again.token_ids) == 60


def test_what_cannot_be_served_is_refused(small_engine):
    for asked, kind in (
        (request(400, max_new_tokens=200), "max_new_tokens"),
        (request(512, max_new_tokens=1), "prompt"),
        (ServeRequest(prompt_ids=(V,), sampling=ServeSampling()), "token id"),
        (ServeRequest(prompt_ids=(), sampling=ServeSampling()), "empty"),
        (request(3, temperature=-1.0), "temperature"),
        (request(3, temperature=float("nan")), "temperature"),
        (request(3, top_p=0.0), "top_p|top-p"),
        (request(3, typical_p=1.5), "typical_p"),
        (request(3, typical_p=float("nan")), "typical_p"),
        (request(3, frequency_penalty=3.0), "frequency_penalty"),
        (request(3, presence_penalty=float("nan")), "presence_penalty"),
        (request(3, logit_bias=((V, 1.0),)), "logit_bias"),
        (request(3, logit_bias=((1, float("inf")),)), "logit_bias"),
        (request(3, logit_bias=((1, 1.0), (1, 2.0))), "logit_bias"),
        (request(3, seed=2**64), "seed"),
        (request(3, top_logprobs=21), "top_logprobs"),
        (request(3, stop=("x",)), "stop"),
        (dataclasses.replace(request(3), adapter_id="x"), "adapter"),
    ):
        with pytest.raises(Refused, match=kind) as caught:
            small_engine.submit(asked)
        assert caught.value.kind == "invalid"
        assert "\n" not in caught.value.message
    assert is_idle(small_engine)


def test_asyncio_reads_many_at_once(small_engine):
    async def read(ticket):
        return [event async for event in ticket.events()]

    async def read_all():
        tickets = [
            small_engine.submit(request(3 + i, max_new_tokens=10, ignore_eos=True))
            for i in range(8)
        ]
        return await asyncio.gather(*map(read, tickets))

    for i, events in enumerate(asyncio.run(read_all())):
        assert isinstance(events[-1], Finished)
        alone = answer(small_engine, request(3 + i, max_new_tokens=10, ignore_eos=True))
        assert events[-1].token_ids == alone.token_ids


def test_expert_load_counts_every_token(small_engine, small_lm):
    def load():
        return np.asarray(small_engine.stats().expert_load)

    before = load()
    last = answer(small_engine, request(21, max_new_tokens=7, ignore_eos=True))
    read = 21 + len(last.token_ids) - 1  # nothing reads the last
    chosen = (load() - before).sum(axis=1)
    assert (chosen == read * small_lm.config.num_experts_per_tok).all()


def test_nothing_compiles_after_ready(make_engine, small_lm):
    engine = make_engine(small_lm, dataclasses.replace(SMALL, prefix_cache_bytes=100_000))
    many_mixed(engine, 40)
    assert engine.stats().counters["compilations_since_ready"] == 0


@pytest.mark.slow
def test_nothing_compiles_in_1000_requests(make_engine, small_lm):
    engine = make_engine(small_lm, dataclasses.replace(SMALL, prefix_cache_bytes=100_000))
    for seed in range(10):
        many_mixed(engine, 100, seed)
    assert engine.stats().counters["compilations_since_ready"] == 0


def many_mixed(engine, number: int, seed: int = 5) -> None:
    rng = random.Random(seed)
    shared = tuple(range(3, 60))
    tickets = []
    for i in range(number):
        asked = mixed_request(rng, V, prompt_logprobs=rng.random() < 0.2)
        if i % 3 == 0:
            asked = dataclasses.replace(asked, prompt_ids=shared + asked.prompt_ids[:50])
        tickets.append(engine.submit(asked))
        if rng.random() < 0.1:
            tickets.pop(rng.randrange(len(tickets))).cancel()
    for ticket in tickets:
        finished(ticket)


def test_a_cached_prefix_changes_no_number(make_engine, small_lm, small_engine):
    engine = make_engine(small_lm, dataclasses.replace(SMALL, prefix_cache_bytes=1 << 20))
    asked = request(100, max_new_tokens=15, temperature=1.0, seed=3, repetition_penalty=1.4)
    without = answer(small_engine, asked)
    first, second = answer(engine, asked), answer(engine, asked)
    longer = dataclasses.replace(asked, prompt_ids=(*asked.prompt_ids[:50], 7, 8, 9))
    third = answer(engine, longer)
    assert [a.cached_tokens for a in (without, first, second, third)] == [0, 0, 96, 48]
    for other in (first, second):
        assert other.token_ids == without.token_ids
        np.testing.assert_allclose(other.logprobs, without.logprobs, atol=LOGPROB_TOLERANCE)
    assert third.token_ids == answer(small_engine, longer).token_ids
    stranger = dataclasses.replace(asked, cache_key="another")
    assert answer(engine, stranger).cached_tokens == 0
    assert engine.stats().gauges["prefix_cache_chunks"] == 6 + 6
    scored = dataclasses.replace(
        asked, sampling=dataclasses.replace(asked.sampling, prompt_logprobs=True)
    )
    assert answer(engine, scored).token_ids == without.token_ids


def test_a_small_cache_forgets_but_does_not_lie(make_engine, small_lm, small_engine):
    engine = make_engine(small_lm, dataclasses.replace(SMALL, prefix_cache_bytes=40_000))
    for _ in range(2):
        for seed in range(5):
            asked = request(70, prompt=seed, max_new_tokens=4, ignore_eos=True)
            assert answer(engine, asked).token_ids == answer(small_engine, asked).token_ids
    assert 0 < engine.stats().gauges["prefix_cache_bytes"] <= 40_000


def test_a_nan_row_fails_alone(make_engine, small_lm):
    embed = small_lm.model.embed_tokens
    sound = embed.get_value()
    embed.set_value(sound.at[5].set(np.nan))
    try:
        engine = make_engine(small_lm, dataclasses.replace(SMALL, prefix_cache_bytes=1 << 20))
        sane = dataclasses.replace(
            request(40, max_new_tokens=30, ignore_eos=True, logit_bias=((5, -100.0),)),
            prompt_ids=tuple(6 + i % 50 for i in range(40)),
        )
        alone = answer(engine, sane)
        bad = dataclasses.replace(sane, prompt_ids=(*sane.prompt_ids, 5, 9))
        for _ in range(3):
            others = [engine.submit(sane) for _ in range(3)]
            rotten = [engine.submit(bad) for _ in range(3)]
            for ticket in rotten:
                fault = failure(ticket)
                assert fault.kind == "generation"
                assert "NaN" in fault.message
            for ticket in others:
                assert finished(ticket).token_ids == alone.token_ids
        # Every slot and scratch row has held NaN by now.
        many = [engine.submit(sane) for _ in range(12)]
        assert all(finished(ticket).token_ids == alone.token_ids for ticket in many)
    finally:
        embed.set_value(sound)


def test_a_full_server_refuses_and_recovers(make_engine, small_lm):
    engine = make_engine(small_lm, dataclasses.replace(SMALL, max_concurrent_requests=5))
    long = request(10, max_new_tokens=400, ignore_eos=True)
    tickets = [engine.submit(long) for _ in range(5)]
    with pytest.raises(Refused) as caught:
        engine.submit(long)
    assert caught.value.kind == "overloaded"
    for ticket in tickets:
        ticket.cancel()
    assert wait_until(lambda: is_idle(engine))
    assert len(answer(engine, request(3, max_new_tokens=2, ignore_eos=True)).token_ids) == 2
    assert engine.stats().counters["refused_overloaded"] == 1


def test_draining_ends_what_runs_and_takes_nothing_new(make_engine, small_lm):
    engine = make_engine(small_lm)
    ticket = engine.submit(request(10, max_new_tokens=60, ignore_eos=True))
    assert not engine.drain(0.0)
    assert engine.state() == "draining"
    with pytest.raises(Refused) as caught:
        engine.submit(request(3))
    assert caught.value.kind == "unavailable"
    assert engine.drain(30.0)
    assert len(finished(ticket).token_ids) == 60
    engine.close()
    assert not engine._thread.is_alive()


def test_ending_while_loading_ends_soon(small_lm):
    engine = Engine(small_lm, dataclasses.replace(SMALL, prefill_chunk=64))  # not compiled yet
    engine.start()
    assert engine.state() == "loading"
    assert engine.drain(1.0)
    engine.close()
    assert engine.state() == "failed"
    with pytest.raises(Refused, match="ended"):
        engine.submit(request(3))


def test_a_dead_engine_answers_every_waiter(make_engine, small_lm, monkeypatch, capsys):
    engine = make_engine(small_lm)
    waiting = [engine.submit(request(10, max_new_tokens=300, ignore_eos=True)) for _ in range(20)]
    readers, ends = [], []
    for ticket in waiting:
        thread = threading.Thread(target=lambda t=ticket: ends.append(list(t.iterate())[-1]))
        thread.start()
        readers.append(thread)

    def explode(self, command):
        raise RuntimeError("planted")

    monkeypatch.setattr(Device, "execute", explode)
    for thread in readers:
        thread.join(5)
    assert [type(end) for end in ends] == [Failed] * 20
    assert {end.kind for end in ends} == {"unavailable"}
    assert engine.state() == "failed"
    with pytest.raises(Refused, match="planted") as caught:
        engine.submit(request(3))
    assert caught.value.kind == "unavailable"
    assert "planted" in capsys.readouterr().err


def test_commands_that_travelled_make_the_same_states(make_engine, small_lm):
    """A follower that executes what rank 0 sends comes to the same tokens."""
    sent: list[commands.Command] = []

    def tell(command: commands.Command) -> None:
        sent.append(commands.from_json(commands.to_json(command)))

    options = dataclasses.replace(SMALL, prefix_cache_bytes=1 << 20)
    engine = make_engine(small_lm, options, tell=tell)
    many_mixed(engine, 8)
    last = answer(engine, request(100, max_new_tokens=20, temperature=1.0, ignore_eos=True))
    engine.close()
    assert isinstance(sent[-1], commands.Stop)
    follower = Device(small_lm.model, LOCAL, engine._plan)
    steps = []
    for command in sent:
        result = follower.execute(command)
        if isinstance(command, commands.Step) and command.running:
            steps.append((command, result))
    tokens: list[int] = []
    for command, result in reversed(steps):  # the last request ran alone
        if len(tokens) >= 20:
            break
        (row,) = command.running
        tokens = result.tokens[row, : result.counts[row]].tolist() + tokens
    assert tuple(tokens) == last.token_ids
