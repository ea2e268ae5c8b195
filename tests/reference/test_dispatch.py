"""The counted dispatch: one case by hand, and laws."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import dispatch

EXPERTS, TOP_K = 4, 2


def test_by_hand():
    # One shard of 4 tokens, 4 experts, 2 choices, factor 1: room for two rows per expert.
    ids = np.array([[0, 1], [0, 1], [0, 1], [2, 0]])
    valid = np.ones(4, bool)
    kept = dispatch.kept(ids, valid, shards=1, num_experts=4, capacity_factor=1.0)
    assert kept.tolist() == [[True, True], [True, True], [False, False], [True, False]]
    dropped = dispatch.dropped(ids, valid, shards=1, num_experts=4, capacity_factor=1.0)
    assert dropped.tolist() == [3]


def test_second_choices_wait_for_all_first_choices():
    # Room for one: token 1's first choice beats token 0's second choice.
    ids = np.array([[1, 0], [0, 1]])
    kept = dispatch.kept(ids, np.ones(2, bool), shards=1, num_experts=4, capacity_factor=1.0)
    assert kept.tolist() == [[True, False], [True, False]]


def test_padding_takes_no_room_and_is_not_counted():
    ids = np.array([[0, 1], [0, 1], [0, 1], [2, 0]])
    valid = np.array([False, True, True, True])
    kept = dispatch.kept(ids, valid, shards=1, num_experts=4, capacity_factor=1.0)
    assert kept.tolist() == [[False, False], [True, True], [True, True], [True, False]]
    dropped = dispatch.dropped(ids, valid, shards=1, num_experts=4, capacity_factor=1.0)
    assert dropped.tolist() == [1]


def test_shards_have_room_of_their_own():
    ids = np.array([[0, 1]] * 4)
    valid = np.ones(4, bool)
    one = dispatch.dropped(ids, valid, shards=1, num_experts=4, capacity_factor=1.0)
    two = dispatch.dropped(ids, valid, shards=2, num_experts=4, capacity_factor=1.0)
    assert (one.tolist(), two.tolist()) == ([4], [2, 2])


def test_capacity_rounds_up():
    assert dispatch.capacity(5, 2, 8, 1.0) == 2
    assert dispatch.capacity(1, 2, 8, 1.0) == 1
    assert dispatch.capacity(64, 2, 8, 1.25) == 20


@st.composite
def cases(draw):
    shards = draw(st.sampled_from([1, 2, 4]))
    rows = shards * draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = rng.random((rows, EXPERTS)).argsort(axis=1)[:, :TOP_K]
    return ids, rng.random(rows) < 0.8, shards


@given(cases(), st.floats(0.1, 4.0))
def test_counts_add_up_and_room_is_respected(case, factor):
    ids, valid, shards = case
    options = {"shards": shards, "num_experts": EXPERTS, "capacity_factor": factor}
    kept = dispatch.kept(ids, valid, **options)
    dropped = dispatch.dropped(ids, valid, **options)
    assert kept.sum() + dropped.sum() == valid.sum() * TOP_K
    local = len(ids) // shards
    room = dispatch.capacity(local, TOP_K, EXPERTS, factor)
    for shard in range(shards):
        part = slice(shard * local, (shard + 1) * local)
        counts = np.bincount(ids[part][kept[part]], minlength=EXPERTS)
        wanted = np.bincount(ids[part][valid[part]].ravel(), minlength=EXPERTS)
        # Nothing is dropped while there is room, and no expert takes more than its room.
        assert counts.tolist() == np.minimum(wanted, room).tolist()


@given(cases())
def test_nothing_is_dropped_with_room_for_all(case):
    ids, valid, shards = case
    dropped = dispatch.dropped(
        ids, valid, shards=shards, num_experts=EXPERTS, capacity_factor=EXPERTS / TOP_K
    )
    assert dropped.tolist() == [0] * shards
