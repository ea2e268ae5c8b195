"""Laws of packing: nothing lost, doubled or split, and no row that could have been saved simply."""

from __future__ import annotations

import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from mixtral_jax.finetune.data.packing import Packing, alone, best_fit

ROW = 16
lengths_of = st.lists(st.integers(1, ROW), min_size=1, max_size=60)


def pack(lengths: list[int], row_length: int = ROW) -> Packing:
    return best_fit(np.array(lengths, np.int64), row_length)


def rows(packing: Packing) -> list[list[int]]:
    return [packing.row(i).tolist() for i in range(packing.num_rows)]


@given(lengths_of)
def test_each_example_is_in_one_row_and_fits(lengths: list[int]):
    packed = rows(pack(lengths))
    assert sorted(i for row in packed for i in row) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in packed)
    assert all(0 < sum(lengths[i] for i in row) <= ROW for row in packed)


@given(lengths_of)
def test_no_two_rows_could_be_one(lengths: list[int]):
    used = sorted(sum(lengths[i] for i in row) for row in rows(pack(lengths)))
    assert len(used) < 2 or used[0] + used[1] > ROW


def best_fit_decreasing(lengths: list[int]) -> list[list[int]]:
    """The rule in its plainest form; of rows with the same room, the one that had it last."""
    packed: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, when)
    for when, i in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [(room, -since, row) for row, (room, since) in enumerate(rooms)]
        fitting = [one for one in fitting if one[0] >= lengths[i]]
        if not fitting:
            packed.append([])
            rooms.append((ROW, when))
        row = min(fitting)[2] if fitting else len(packed) - 1
        packed[row].append(i)
        rooms[row] = (rooms[row][0] - lengths[i], when)
    return [sorted(row) for row in packed]


@given(lengths_of)
def test_it_is_best_fit_decreasing(lengths: list[int]):
    assert rows(pack(lengths)) == best_fit_decreasing(lengths)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([16, 16], [[0], [1]]),
        ([5, 16, 11], [[1], [0, 2]]),
        ([9, 6, 8, 7, 2], [[0, 3], [1, 2, 4]]),
        ([1] * 17, [list(range(16)), [16]]),
    ],
)
def test_by_hand(lengths: list[int], expected: list[list[int]]):
    assert rows(pack(lengths)) == expected


def test_alone():
    assert rows(alone(3)) == [[0], [1], [2]]


def test_a_published_set_is_packed_in_moments():
    lengths = np.random.default_rng(0).integers(20, 2049, 50_000)
    begin = time.perf_counter()
    packing = best_fit(lengths, 2048)
    assert time.perf_counter() - begin < 5
    assert lengths.sum() / (packing.num_rows * 2048) > 0.99
