"""Which experts are on the device: turns, what is kept, what is copied ahead."""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.offload.experts import DeviceExperts
from mixtral_jax.offload.ledger import Ledger
from mixtral_jax.offload.parts import num_bytes
from tests.offload.models import on_host

LAYERS, EXPERTS = 4, 8
DEVICE = jax.devices()[2]
NONE = np.zeros((EXPERTS,), np.int32)


def rows_of(*experts: int) -> np.ndarray:
    """Each expert's rows: the first has most."""
    rows = NONE.copy()
    for place, expert in enumerate(experts):
        rows[expert] = len(experts) - place
    return rows


@pytest.fixture
def host():
    def expert(layer: int, e: int) -> ExpertWeights:
        parts = [jnp.full((1, 2, 4), 10 * layer + e + part) for part in (0.1, 0.2, 0.3)]
        return jax.device_put(ExpertWeights(*parts), on_host(DEVICE))

    return [[expert(layer, e) for e in range(EXPERTS)] for layer in range(LAYERS)]


@pytest.fixture
def make(host):
    """Room for so many experts, in tenths of one so that a rounding would show."""

    def with_room(count: float, **fields) -> DeviceExperts:
        budget = int(count * num_bytes(host[0][0]))
        return DeviceExperts(host, Ledger(budget), DEVICE, **fields)

    return with_room


def visit(experts: DeviceExperts, host, layer: int, needed, guess=NONE) -> list[int]:
    """The experts in the order that they came; each is what the host has."""
    came = []
    for e, weights in experts.visits(layer, needed, guess):
        for mine, its in zip(jax.tree.leaves(weights), host[layer][e], strict=True):
            np.testing.assert_array_equal(np.asarray(mine), its)
            assert mine.sharding.device_set == {DEVICE}
        assert isinstance(weights.gate, jax.Array)
        sign = weights.gate[0, 0, 0] + 1
        experts.read(layer, e, sign)
        came.append(e)
    return came


@pytest.mark.parametrize("room", [1, 1.9, 2, 5.5, 8, 32])
def test_experts_take_turns_where_there_is_room_for_fewer(make, host, room):
    """The same experts in the same order, however few fit; never more than fit."""
    experts = make(room)
    for layer in range(LAYERS):
        assert visit(experts, host, layer, rows_of(*range(EXPERTS)), rows_of(3, 1)) == [*range(8)]
        assert visit(experts, host, layer, rows_of(6, 2)) == [2, 6]
        assert len(experts) <= room
    counts = experts.counts
    assert counts.visits == LAYERS * (EXPERTS + 2)
    assert experts._ledger.peak <= experts._ledger.budget
    assert counts.copied_bytes % num_bytes(host[0][0]) == 0


def test_an_expert_is_kept_while_there_is_room(make, host):
    experts = make(LAYERS * 2)
    for _ in range(3):
        for layer in range(LAYERS):
            visit(experts, host, layer, rows_of(layer, 7))
    assert (experts.counts.copied, experts.counts.kept) == (LAYERS * 2, 2 * LAYERS * 2)


def test_with_room_for_fewer_than_a_pass_visits_some_stay(make, host):
    """A plain LRU would always have dropped what comes next: no visit would find its expert."""
    experts = make(6)
    for _ in range(20):
        for layer in range(LAYERS):
            visit(experts, host, layer, rows_of(layer, 7))
    steady = experts.counts.kept / (20 * LAYERS * 2)
    assert steady > 0.4


def test_within_a_layer_the_least_recently_used_goes(make, host):
    experts = make(3)
    for needed in (0, 1, 2, 0, 3):  # 3 takes the place of 1
        visit(experts, host, 0, rows_of(needed))
    before = experts.counts.copied
    visit(experts, host, 0, rows_of(0, 2, 3))
    assert experts.counts.copied == before
    visit(experts, host, 0, rows_of(1))
    assert experts.counts.copied == before + 1


def test_a_guess_is_copied_ahead_and_counted_once(make, host):
    experts = make(8)
    visit(experts, host, 0, rows_of(0, 1), rows_of(4, 5))
    assert (experts.counts.prefetched, len(experts)) == (2, 4)
    visit(experts, host, 1, rows_of(4, 6))  # one guess was right
    counts = experts.counts
    assert (counts.guessed, counts.copied, counts.kept) == (1, 3, 0)
    visit(experts, host, 1, rows_of(4, 6))
    assert (counts.guessed, counts.copied, counts.kept) == (1, 3, 2)
    assert counts.hit_rate == 3 / 6


def test_a_guess_takes_nothing_away_that_the_layer_needs(make, host):
    experts = make(2)
    visit(experts, host, 0, rows_of(0, 1), rows_of(4, 5))
    assert experts.counts.prefetched == 0
    visit(experts, host, 0, rows_of(0, 1))
    assert experts.counts.kept == 2


def test_the_guess_with_most_rows_comes_first(make, host):
    experts = make(3)
    visit(experts, host, 0, rows_of(0, 1), rows_of(5, 4))  # room for one more: 5
    visit(experts, host, 1, rows_of(5))
    assert experts.counts.guessed == 1


def test_make_room_ends_with_nothing(make, host):
    experts = make(3)
    visit(experts, host, 2, rows_of(0, 1, 2))
    experts.make_room(num_bytes(host[0][0]))
    assert len(experts) == 2
    experts.make_room(10**9)
    assert (len(experts), experts._ledger.total) == (0, 0)


def test_a_copy_is_never_the_hosts_own_memory(make, host):
    """Else on a CPU nothing would be copied, and taking an expert away would lose it."""
    experts = make(1)
    for _, weights in experts.visits(0, rows_of(0), NONE):
        for mine, its in zip(jax.tree.leaves(weights), host[0][0], strict=True):
            assert mine.unsafe_buffer_pointer() != its.unsafe_buffer_pointer()
    experts.make_room(10**9)
    np.testing.assert_array_equal(np.asarray(host[0][0].gate), np.full((1, 2, 4), 0.1, np.float32))


def fails(error):
    """A function that does."""

    def function(*arguments):
        raise error

    return function


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_copy_that_fails_is_not_in_the_ledger(make, host, monkeypatch, error):
    experts, size = make(2), num_bytes(host[0][0])
    visit(experts, host, 0, rows_of(0))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_put", fails(error))
        with pytest.raises(error):
            visit(experts, host, 0, rows_of(1))
    assert (len(experts), experts._ledger.total) == (1, size)
    assert visit(experts, host, 0, rows_of(0, 1)) == [0, 1]
    assert (len(experts), experts._ledger.total) == (2, 2 * size)


@pytest.mark.parametrize(("error", "left"), [(RuntimeError, 0), (KeyboardInterrupt, 1)])
def test_an_expert_is_there_or_not_in_the_ledger(make, host, monkeypatch, error, left):
    """After Ctrl-C a program may still read it; after a program has failed nothing does."""
    experts = make(1)
    visit(experts, host, 0, rows_of(0))
    with monkeypatch.context() as patch:
        patch.setattr(jax, "block_until_ready", fails(error))
        with pytest.raises(error):
            experts.make_room(10**9)
    assert (len(experts), experts._ledger.total) == (left, left * num_bytes(host[0][0]))
    experts.make_room(10**9)
    assert (len(experts), experts._ledger.total) == (0, 0)


def test_the_time_that_copies_take_is_counted(make, host, monkeypatch):
    """Where the backend copies at once, and where it is waited for later."""
    put = jax.device_put

    def slow(*arguments):
        time.sleep(0.05)
        return put(*arguments)

    monkeypatch.setattr(jax, "device_put", slow)
    experts = make(2)
    visit(experts, host, 0, rows_of(0, 1))
    before = dataclasses.replace(experts.counts)
    assert before.waited > 0.1
    visit(experts, host, 0, rows_of(0, 1))
    visit(experts, host, 1, rows_of(5))
    found = experts.counts.since(before)
    assert (found.kept, found.copied) == (2, 1)
    assert found.copied_bytes == num_bytes(host[0][0])
    assert 0.05 < found.waited < experts.counts.waited
