"""Ternary rows: they fit their room, and no ternary row with those zeros is nearer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.qtensor import packed_size
from mixtral_jax.quantize.ternary import kept, rank, round_rows
from mixtral_jax.ternary_code import coded_lengths


def gaussian(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, inputs)).astype(np.float32)


def relative(w: np.ndarray, values: np.ndarray) -> float:
    return float(np.linalg.norm(w - values) / np.linalg.norm(w))


@settings(max_examples=30)
@given(groups=st.integers(1, 4), seed=st.integers(0, 99), power=st.sampled_from([1, 3]))
def test_rows_fit_and_keep_their_largest_values_at_their_mean(groups, seed, power):
    w = gaussian(7, 64 * groups, seed) ** power
    size = packed_size("qmoe", w.shape[1])
    codes, scales = round_rows(w, size)
    lengths = coded_lengths(codes)
    assert (lengths <= size).all()
    for row, code, scale in zip(w, codes, scales, strict=True):
        is_kept = code != 0
        np.testing.assert_array_equal(code[is_kept], np.sign(row[is_kept]))
        assert np.abs(row[~is_kept]).max() <= np.abs(row[is_kept]).min()
        assert scale == pytest.approx(np.abs(row[is_kept]).mean(), rel=1e-5)


def test_with_room_for_all_the_error_is_the_least_of_all_ternary_rows():
    w = gaussian(5, 64)
    codes, scales = round_rows(w, 64)
    for row, code, scale in zip(w, codes, scales, strict=True):
        order = np.argsort(-np.abs(row))
        errors = []
        for k in range(1, 65):
            values = np.zeros(64, np.float32)
            values[order[:k]] = np.sign(row[order[:k]]) * np.abs(row[order[:k]]).mean()
            errors.append(np.linalg.norm(row - values))
        assert np.linalg.norm(row - code * scale) == pytest.approx(min(errors), rel=1e-5)


def test_rows_of_zeros_and_rows_alike():
    w = np.zeros((3, 64), np.float32)
    w[1, 5] = -2  # one value
    w[2] = 0.5  # nothing tells which to keep: the first
    codes, scales = round_rows(w, 3)
    assert not codes[0].any()
    assert scales[0] == 0
    assert codes[1].tolist() == [0] * 5 + [-1] + [0] * 58
    assert scales.tolist()[1:] == [2, 0.5]
    ones = np.flatnonzero(codes[2])
    assert ones.tolist() == list(range(len(ones)))
    assert len(ones) > 0


def test_thresholds_leave_as_many_values_as_were_asked_for():
    w = gaussian(4, 64)
    k = np.array([0, 1, 40, 64])
    thresholds, scales = kept(rank(w), k)
    assert (np.abs(w) > thresholds[:, None]).sum(axis=1).tolist() == k.tolist()
    assert scales[0] == 0
    assert scales[3] == pytest.approx(np.abs(w[3]).mean(), rel=1e-6)


def test_gaussian_rows_at_full_width_are_nearer_than_between_smallest_and_largest():
    """The grid of QMoE, from a row's smallest value to its largest, has error 0.89 here."""
    w = gaussian(32, 4096)
    codes, scales = round_rows(w, packed_size("qmoe", 4096))
    assert relative(w, codes * scales[:, None]) == pytest.approx(0.727, abs=0.005)
    assert (codes == 0).mean() == pytest.approx(0.881, abs=0.005)
    low, high = w.min(axis=1, keepdims=True), w.max(axis=1, keepdims=True)
    widest = np.where(w > high / 2, high, np.where(w < low / 2, low, 0))
    assert relative(w, widest) > 0.85
