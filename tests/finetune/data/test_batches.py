"""Batches hold every token once, in one order for any number of processes, and go on exactly."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.finetune.data.batches import Batch, Batches
from mixtral_jax.finetune.data.encode import Example, Pair
from mixtral_jax.finetune.data.examples import Examples

LENGTH = 12


def example(i: int, num_tokens: int, num_prompt: int) -> Example:
    """Its ids tell the example and the place: no two tokens of a test are alike."""
    ids = np.arange(num_tokens, dtype=np.int32) + 100 * (i + 1)
    return Example(ids, np.arange(num_tokens) >= num_prompt)


def some(count: int, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    sizes = draw.integers(2, LENGTH + 1, count)
    return [example(i, int(n), int(draw.integers(1, n))) for i, n in enumerate(sizes)]


def some_pairs(count: int) -> list[Pair]:
    return [Pair(example(i, 4 + i % 5, 3), example(1000 + i, 9 - i % 4, 3)) for i in range(count)]


def batches(encoded: list[Any], **options: Any) -> Batches:
    defaults = {"rows": 2, "accumulation": 1, "length": LENGTH, "packing": True, "seed": 7}
    return Batches(Examples(encoded, max_length=LENGTH), **(defaults | options))


def sequences(batch: Batch) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """(ids, marks) of all sequences of a batch; checks what is said of targets and padding."""
    found = []
    parts = [part.reshape(-1, part.shape[-1]) for part in batch]
    for tokens, targets, weights, segments in zip(*parts, strict=True):
        used = int(np.count_nonzero(segments))
        assert (segments[:used] > 0).all()  # padding is at the end
        assert not tokens[used:].any()
        assert not targets[used:].any()
        assert not weights[used:].any()
        assert (np.unique(segments[:used]) == np.arange(1, segments.max() + 1)).all()
        assert (np.diff(segments[:used]) >= 0).all()
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            ids = tokens[here]
            assert (targets[here[:-1]] == ids[1:]).all()
            assert (targets[here[-1]], weights[here[-1]]) == (0, 0)
            found.append((tuple(ids.tolist()), (False, *(weights[here[:-1]] == 1).tolist())))
    return found


def test_tokens_of_a_prompt_count_what_they_are_given_and_padding_nothing():
    one = [example(0, num_tokens=6, num_prompt=3), example(1, num_tokens=4, num_prompt=2)]
    batch = next(batches(one, rows=1, prompt_weight=0.25))
    weights = [0.25, 0.25, 1, 1, 1, 0, 0.25, 1, 1, 0, 0, 0]
    np.testing.assert_array_equal(batch.weights[0, 0], weights)
    plain = next(batches(one, rows=1))
    np.testing.assert_array_equal(plain.weights[0, 0], [w == 1 for w in weights])


def as_sequences(encoded: list[Example]) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    return [(tuple(one.ids.tolist()), tuple(one.is_target.tolist())) for one in encoded]


def take(source: Batches, count: int) -> list[Batch]:
    return [next(source) for _ in range(count)]


def equal(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for left, right in zip(one, other, strict=True)
        for a, b in zip(left, right, strict=True)
    )


@given(
    count=st.integers(1, 30),
    packing=st.booleans(),
    rows=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_epoch_has_every_token_once(
    count: int, packing: bool, rows: int, accumulation: int, seed: int
):
    encoded = some(count, seed)
    source = batches(encoded, packing=packing, rows=rows, accumulation=accumulation, seed=seed)
    # As many steps as make whole epochs.
    steps = np.lcm(source.num_rows, source.rows_per_step) // source.rows_per_step
    epochs = steps * source.rows_per_step // source.num_rows
    given_ = [one for batch in take(source, int(steps)) for one in sequences(batch)]
    assert sorted(given_) == sorted(as_sequences(encoded) * int(epochs))
    assert source.epoch == epochs
    once = [one for batch in source.once() for one in sequences(batch)]
    assert sorted(once) == sorted(as_sequences(encoded))
    assert source.epoch == epochs


def test_shapes_and_dtypes():
    (batch,) = take(batches(some(20), rows=3, accumulation=2), 1)
    assert {part.shape for part in batch} == {(2, 3, LENGTH)}
    assert [part.dtype for part in batch] == ["int32", "int32", "float32", "int32"]


def test_packing_fills_rows():
    packed, alone = batches(some(200)), batches(some(200), packing=False)
    assert alone.num_rows == 200
    assert packed.num_rows < 140
    tokens = sum(int(np.count_nonzero(batch.segments)) for batch in packed.once())
    assert tokens > 0.9 * packed.num_rows * LENGTH


def test_steps_of_an_epoch_and_the_rows_of_the_next():
    source = batches(some(10), packing=False, rows=2, accumulation=2)
    assert (source.num_rows, source.rows_per_step, source.steps_per_epoch) == (10, 4, 3)
    epochs = [one[0][0] for batch in take(source, 5) for one in sequences(batch)]
    assert sorted(epochs[:10]) == sorted(epochs[10:])
    assert epochs[:10] != epochs[10:]  # shuffled anew
    assert source.epoch == 2


def test_the_order_comes_from_the_seed():
    first = take(batches(some(40), seed=1), 8)
    assert equal(first, take(batches(some(40), seed=1), 8))
    assert not equal(first, take(batches(some(40), seed=2), 8))


def test_the_order_does_not_change_between_versions():
    source = batches(some(8), packing=False, rows=1, seed=3)
    ids = [sequences(batch)[0][0][0] // 100 - 1 for batch in take(source, 16)]
    assert ids == GOLDEN_ORDER


GOLDEN_ORDER = [6, 1, 5, 2, 7, 4, 3, 0, 7, 3, 5, 6, 4, 0, 2, 1]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_all_processes_make_the_batches_of_one(packing: bool, num_parts: int):
    encoded = some(37)
    options: dict[str, Any] = {"accumulation": 3, "packing": packing}
    alone = batches(encoded, rows=4, **options)
    options |= {"num_parts": num_parts, "rows": 4 // num_parts}
    parts = [batches(encoded, part_id=i, **options) for i in range(num_parts)]
    assert {part.steps_per_epoch for part in parts} == {alone.steps_per_epoch}
    for _ in range(10):
        shares = [next(part) for part in parts]
        joined = Batch(*(np.concatenate(arrays, axis=1) for arrays in zip(*shares, strict=True)))
        assert equal([joined], [next(alone)])
        counts = {source.num_tokens for source in (alone, *parts)}
        assert counts == {np.count_nonzero(joined.segments)}
    once = [list(part.once()) for part in parts]
    joined = [
        Batch(*(np.concatenate(arrays, axis=1) for arrays in zip(*shares, strict=True)))
        for shares in zip(*once, strict=True)
    ]
    assert equal(joined, list(alone.once()))


def test_pairs_lie_in_halves_of_a_batch():
    encoded = some_pairs(10)
    source = batches(encoded, rows=4, accumulation=2, packing=True)
    assert (source.num_rows, source.rows_per_step, source.steps_per_epoch) == (10, 4, 3)
    partner = {
        tuple(chosen.ids.tolist()): tuple(rejected.ids.tolist()) for chosen, rejected in encoded
    }
    seen = []
    for batch in take(source, 5):
        assert batch.segments.max() == 1
        for a in range(2):
            part = Batch(*(array[a : a + 1] for array in batch))
            ids = [one[0] for one in sequences(part)]
            assert [partner[one] for one in ids[:2]] == ids[2:]
            seen += ids[:2]
    assert sorted(seen) == sorted([*partner] * 2)


def test_processes_share_out_pairs():
    encoded = some_pairs(9)
    alone = batches(encoded, rows=4)
    parts = [batches(encoded, rows=2, part_id=i, num_parts=2) for i in range(2)]
    for _ in range(9):
        whole, shares = next(alone), [next(part) for part in parts]
        for i, share in enumerate(shares):
            assert np.array_equal(share.tokens[:, 0], whole.tokens[:, i])
            assert np.array_equal(share.tokens[:, 1], whole.tokens[:, 2 + i])


KINDS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "packed": (some(50), {"rows": 3, "accumulation": 2}),
    "alone": (some(23), {"packing": False}),
    "pairs": (some_pairs(11), {"rows": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_state_goes_on_bit_for_bit(kind: str):
    encoded, options = KINDS[kind]
    straight = batches(encoded, **options)
    total = 3 * straight.steps_per_epoch
    expected = take(straight, total)
    # At once, inside an epoch, at its last step (which may cross into the next), and beyond.
    for cut in (0, 1, straight.steps_per_epoch - 1, straight.steps_per_epoch, total - 1):
        stopped = batches(encoded, **options)
        before = take(stopped, cut)
        state = json.loads(json.dumps(stopped.state()))
        resumed = batches(encoded, **options)
        resumed.restore(state)
        assert resumed.epoch == stopped.epoch
        assert equal(before + take(resumed, total - cut), expected)
        assert resumed.state() == straight.state()
    assert len(json.dumps(straight.state())) < 400


def test_a_batch_across_the_epochs_end_is_restored():
    options = {"packing": False, "rows": 4}
    straight = batches(some(10), **options)
    take(straight, 2)
    crossing = batches(some(10), **options)
    crossing.restore(straight.state())
    assert crossing.epoch < 1
    assert equal(take(crossing, 1), take(straight, 1))
    assert crossing.epoch > 1


def test_a_state_may_go_on_with_other_processes():
    encoded = some(30)
    alone = batches(encoded, rows=4)
    take(alone, 3)
    part = batches(encoded, rows=2, part_id=1, num_parts=2)
    part.restore(alone.state())
    assert np.array_equal(next(part).tokens, next(alone).tokens[:, 2:])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 8}, "--seed: expected 7 as in the checkpoint, got 8"),
        ({"packing": False}, "--packing: expected True as in the checkpoint"),
        ({"accumulation": 2}, "--gradient-accumulation-steps: expected 1"),
        ({"rows": 4}, "rows of a step (of all devices): expected 2"),
        ({"length": 16}, "--max-length: expected 12"),
    ],
)
def test_another_order_is_refused(change: dict[str, Any], told: str):
    state = batches(some(20)).state()
    with pytest.raises(MixtralError) as caught:
        batches(some(20), **change).restore(state)
    assert caught.value.code == BAD_DATA
    assert told in str(caught.value)
    batches(some(20)).restore(state)


def test_other_data_is_refused():
    state = batches(some(20)).state()
    encoded = some(20)
    encoded[11].ids[0] += 1
    marks = some(20)
    marks[3].is_target[-1] = False
    marks[3].is_target[1] = True
    for other in (encoded, marks, some(19), [*some(20)[1:], some(20)[0]]):
        with pytest.raises(MixtralError, match="digest of the training data") as caught:
            batches(other).restore(state)
        assert caught.value.code == BAD_DATA
        assert state["data"] in str(caught.value)


@pytest.mark.parametrize("rows_taken", [None, -1, "3", 1.5])
def test_a_state_that_is_none(rows_taken: Any):
    source = batches(some(5))
    with pytest.raises(MixtralError, match="expected a count") as caught:
        source.restore(source.state() | {"rows_taken": rows_taken})
    assert caught.value.code == BAD_DATA


def test_rows_and_lengths_that_do_not_fit():
    with pytest.raises(MixtralError, match="expected an even number, got 3") as caught:
        batches(some_pairs(4), rows=3)
    assert caught.value.code == USAGE
    longest = max(len(one.ids) for one in some(30))
    with pytest.raises(MixtralError, match=f"expected at least {longest}") as caught:
        batches(some(30), length=longest - 1)
    assert caught.value.code == USAGE


def test_the_examples_of_a_step_are_told_by_number():
    """Those that the step behind a state has, and no others."""
    encoded = some(40)
    numbers = {tuple(one.ids.tolist()): n for n, one in enumerate(encoded, start=1)}
    drawn = batches(encoded, rows=3)
    for _ in range(4):
        state = drawn.state()
        had = {numbers[ids] for ids, _ in sequences(next(drawn))}
        told = drawn.describe(state)
        shown = told.removeprefix("examples ").partition(" and ")[0].removesuffix(" of the data")
        assert [int(n) for n in shown.split(", ")] == sorted(had)[:10]
