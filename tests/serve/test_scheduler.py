"""Laws of the bookkeeping, over random histories of requests."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.errors import MixtralError
from mixtral_jax.serve.prefix import PrefixCache, chunk_digests
from mixtral_jax.serve.request import EngineLimits, Refused
from mixtral_jax.serve.scheduler import Job, Scheduler
from mixtral_jax.serve.slots import LengthClass, Slots, class_lengths, plan_classes

CLASSES = (LengthClass(length=8, rows=2), LengthClass(length=32, rows=3))
LIMITS = EngineLimits(
    max_input_tokens=24,
    max_total_tokens=32,
    max_batch_prefill_tokens=30,
    max_batch_total_tokens=90,
    max_concurrent_requests=12,
    max_batch_size=4,
    waiting_served_ratio=0.5,
)


def scheduler(scratch_rows=2, **changes) -> Scheduler:
    limits = dataclasses.replace(LIMITS, **changes)
    return Scheduler(limits, CLASSES, scratch_rows=scratch_rows, max_waiting_tokens=5)


def check_places(sched: Scheduler, live: dict) -> None:
    """Everything admitted has a slot of its own that is long enough, and the sums hold."""
    slots = [place.slot for place in live.values()]
    assert len(set(slots)) == len(slots)
    for place in live.values():
        assert CLASSES[place.slot.class_id].length >= place.job.total
    assert sched.num_admitted == len(live) <= (LIMITS.max_batch_size or 0)
    assert sched.admitted_tokens <= LIMITS.max_batch_total_tokens
    assert sched.slots.num_taken == len(live)


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(20, 60))
def test_every_request_ends_and_no_place_is_lost(seed, num_turns):
    rng, sched = random.Random(seed), scheduler()
    live, reading, submitted, ended = {}, set(), [], set()
    for turn in range(num_turns):
        job = Job(turn, rng.randint(1, 26), rng.randint(1, 10))
        try:
            sched.submit(job)
            submitted.append(turn)
        except Refused as refused:
            too_long = job.prompt_tokens > LIMITS.max_input_tokens or job.total > 32
            assert refused.kind == ("invalid" if too_long else "overloaded")  # noqa: PT017
        for place in sched.admit():
            live[place.job.key] = place
            reading.add(place.job.key)
        check_places(sched, live)
        scratch = [live[k].scratch_row for k in reading]
        assert len(set(scratch)) == len(scratch)
        for key in [k for k in reading if rng.random() < 0.5]:
            reading.remove(key)
            sched.has_read(key)
        sched.note_steps(rng.randint(0, 3))
        # Running ones finish; anything may be cancelled wherever it is.
        for key in [k for k in live if rng.random() < (0.1 if k in reading else 0.4)]:
            sched.end(key)
            live.pop(key)
            reading.discard(key)
            ended.add(key)
        waiting = [k for k in submitted if k not in live and k not in ended]
        if waiting and rng.random() < 0.1:
            key = rng.choice(waiting)
            sched.end(key)
            ended.add(key)
    for _ in range(100):
        for place in sched.admit():
            live[place.job.key] = place
        sched.note_steps(1)
        for key in list(live):
            sched.end(key)
            live.pop(key)
            ended.add(key)
    assert ended == set(submitted), "somebody starved"
    assert sched.slots.num_taken == sched.num_waiting == sched.reading_tokens == 0


def test_a_short_request_passes_one_that_waits_for_a_long_slot():
    sched = scheduler(3, waiting_served_ratio=0.0, max_batch_total_tokens=1000, max_batch_size=9)
    for key in range(4):
        sched.submit(Job(key, 2, 20))
    assert len(sched.admit()) == 3  # all long slots
    for key in (0, 1):
        sched.has_read(key)
    sched.submit(Job("short", 2, 2))
    assert [(p.job.key, p.slot.class_id) for p in sched.admit()] == [("short", 0)]
    # One that could use the slot that 3 waits for does not get it.
    sched.submit(Job("late", 2, 20))
    sched.has_read(2)
    sched.end(0)
    assert [p.job.key for p in sched.admit()] == [3]


def test_few_waiting_requests_wait_for_many_running_ones_but_not_forever():
    sched = scheduler(4, max_batch_total_tokens=1000, max_batch_size=9)
    for key in range(4):
        sched.submit(Job(key, 1, 1 if key < 2 else 20))
    assert len(sched.admit()) == 4
    for key in range(4):
        sched.has_read(key)
    sched.end(3)
    sched.end(0)
    sched.submit(Job("new", 1, 1))
    assert [p.job.key for p in sched.admit()] == ["new"]  # 1 >= floor(2 * 0.5)
    for key in range(5, 8):
        sched.submit(Job(key, 1, 20))
    sched.limits = dataclasses.replace(LIMITS, waiting_served_ratio=9.0, max_batch_size=9)
    assert not sched.could_admit()
    assert sched.admit() == []
    sched.note_steps(5)
    assert sched.could_admit()
    assert len(sched.admit()) == 2
    assert not sched.could_admit(), "no slot is free"


def test_prompts_being_read_stay_within_the_limit():
    sched = scheduler(waiting_served_ratio=0.0)
    sched.submit(Job("a", 20, 1))
    sched.submit(Job("b", 20, 1))
    assert [p.job.key for p in sched.admit()] == ["a"]
    sched.has_read("a")
    assert [p.job.key for p in sched.admit()] == ["b"]


@given(st.integers(16, 40_000), st.sampled_from([2, 4, 16]), st.integers(1, 64))
def test_planned_classes_fit_their_tokens(max_total, multiple, size):
    lengths = class_lengths(max_total)
    assert lengths[-1] == max_total
    assert lengths == sorted(set(lengths))
    budget = sum(lengths) * multiple * 3
    plan = plan_classes(
        max_total, max_batch_total_tokens=budget, max_batch_size=size, multiple=multiple
    )
    assert [c.length for c in plan] == lengths
    assert all(c.rows % multiple == 0 and c.rows >= multiple for c in plan)
    assert sum(c.length * c.rows for c in plan) <= budget
    with pytest.raises(MixtralError, match="max-batch-total-tokens"):
        plan_classes(
            max_total, max_batch_total_tokens=sum(lengths) * multiple - 1, multiple=multiple
        )


@given(st.integers(16, 40_000), st.sampled_from([2, 4]), st.sampled_from([2, 8]))
def test_rows_are_spread_where_that_costs_no_device_more(max_total, multiple, spread):
    lengths = class_lengths(max_total)
    for times in (1, 2, spread, 3 * spread):
        budget = sum(lengths) * multiple * times
        plan = plan_classes(
            max_total, max_batch_total_tokens=budget, multiple=multiple, spread=spread
        )
        assert all(c.rows % (multiple * spread) == 0 for c in plan)
        assert sum(c.length * c.rows for c in plan) <= max(budget, sum(lengths) * multiple * spread)
    with pytest.raises(MixtralError, match=f"at least {sum(lengths) * multiple} "):
        plan_classes(
            max_total,
            max_batch_total_tokens=sum(lengths) * multiple - 1,
            multiple=multiple,
            spread=spread,
        )


def test_a_slot_is_given_back_once():
    slots = Slots(CLASSES)
    slot = slots.take(0)
    slots.free(slot)
    with pytest.raises(KeyError):
        slots.free(slot)


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@given(prompts, prompts, st.integers(1, 4))
def test_digests_are_equal_as_long_as_prompts_are(one, other, chunk):
    def digests(ids, key="k", adapter=None):
        return list(chunk_digests(ids, chunk, cache_key=key, adapter_id=adapter))

    ours, theirs = digests(one), digests(other)
    assert len(ours) == (len(one) - 1) // chunk
    for i, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        end = (i + 1) * chunk
        assert (a == b) == (one[:end] == other[:end])
    assert not set(ours) & set(digests(one, key="l"))
    assert not set(ours) & set(digests(one, adapter=""))


@settings(max_examples=60)
@given(st.lists(st.tuples(prompts, st.integers(1, 5)), max_size=30))
def test_the_cache_never_lies_and_never_grows_beyond_its_bytes(history):
    cache, held = PrefixCache(12), {}
    for prompt, size in history:
        digests = list(chunk_digests(prompt, 2, cache_key="", adapter_id=None))
        found = cache.longest(digests)
        assert found == [held[d][0] for d in digests[: len(found)]]
        assert len(found) == len(digests) or digests[len(found)] not in held
        for digest in digests[len(found) :]:
            if cache.has(digest):
                continue
            before = digests[: digests.index(digest)]
            block, left = cache.keep(digest, size, before)
            held = {d: b for d, b in held.items() if b[0] not in left}
            if block is None:
                spared = sum(held[d][1] for d in set(before) & held.keys())
                assert spared + size > 12
                continue
            held[digest] = (block, size)
        assert cache.num_bytes == sum(size for _, size in held.values()) <= 12
        assert len(cache) == len(held)


def test_a_prompt_longer_than_the_cache_keeps_its_beginning():
    digests = [bytes([i]) for i in range(6)]
    cache = PrefixCache(3)
    for _ in range(2):
        for i, digest in enumerate(digests):
            if not cache.has(digest):
                cache.keep(digest, 1, digests[:i])
        assert len(cache.longest(digests)) == 3


def test_what_was_used_longest_ago_leaves_first():
    cache = PrefixCache(3)
    ids = {name: cache.keep(name, 1)[0] for name in (b"a", b"b", b"c")}
    assert cache.longest([b"a"]) == [ids[b"a"]]
    ids[b"d"], left = cache.keep(b"d", 1)
    assert left == [ids[b"b"]]
    assert cache.keep(b"e", 4) == (None, [])
    # Of one prefix the end leaves before the beginning.
    assert cache.longest([b"c", b"a"]) == [ids[b"c"], ids[b"a"]]
    left = [cache.keep(name, 1)[1] for name in (b"x", b"y", b"z")]
    assert left == [[ids[b"d"]], [ids[b"a"]], [ids[b"c"]]]
