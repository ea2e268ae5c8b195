"""The dictionary of ternary runs: exact both ways for any rows, and the same for ever."""

from __future__ import annotations

import functools
import hashlib
import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.ternary_code import (
    NUM_CODEWORDS,
    PAIRS,
    SPARSITY,
    coded_lengths,
    decode,
    decode_on_device,
    dictionary,
    encode,
    is_sound,
    used,
)

VALUES = (0, 1, -1)


def drawn(rows: int, inputs: int, zeros: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    sides = (1 - zeros) / 2
    return draw.choice(VALUES, (rows, inputs), p=(zeros, sides, sides)).astype(np.int8)


@functools.cache
def runs() -> dict[tuple[int, ...], int]:
    """Codeword by run, read value by value from the table."""
    found = {}
    for codeword, (first, second) in enumerate(dictionary().entries.tolist()):
        digits = [(first >> 2 * j) & 3 for j in range(16)]
        digits += [(second >> 2 * j) & 3 for j in range(12)]
        found[tuple(VALUES[digit] for digit in digits[: second >> 24])] = codeword
    return found


def encoded_by_hand(row: list[int]) -> list[int]:
    """The longest run of pairs that is in the dictionary, again and again."""
    row = row + [0] * (len(row) % 2)
    words, at = [], 0
    while at < len(row):
        sizes = range(min(2 * PAIRS, len(row) - at), 0, -2)
        size = next(size for size in sizes if tuple(row[at : at + size]) in runs())
        words.append(runs()[tuple(row[at : at + size])])
        at += size
    return words


@settings(max_examples=60)
@given(
    rows=st.integers(1, 5),
    inputs=st.integers(1, 130),
    zeros=st.one_of(st.sampled_from([0.0, 1.0, SPARSITY]), st.floats(0, 1)),
    seed=st.integers(0, 99),
)
def test_any_rows_are_decoded_exactly_and_each_alone(rows, inputs, zeros, seed):
    codes = drawn(rows, inputs, zeros, seed)
    words = encode(codes)
    lengths = coded_lengths(codes)
    assert words.dtype == np.uint16
    assert words.shape == (rows, lengths.max())
    np.testing.assert_array_equal(decode(words, inputs), codes)
    assert is_sound(words, inputs)
    assert used(words) == lengths.sum()
    for row, own, length in zip(codes, words, lengths, strict=True):
        assert own[:length].tolist() == encoded_by_hand(row.tolist())
        assert not own[length:].any()
        np.testing.assert_array_equal(decode(own[None, :length], inputs)[0], row)


@pytest.mark.parametrize("zeros", [0.0, 0.5, SPARSITY, 1.0])
@pytest.mark.parametrize("inputs", [1, 2, 27, 64, 131])
def test_the_device_decodes_the_same(inputs, zeros):
    codes = drawn(6, inputs, zeros)
    codes[2] = 0  # a short row among long ones
    words = encode(codes)
    got = decode_on_device(jnp.asarray(words.reshape(2, 3, -1)), inputs)
    np.testing.assert_array_equal(got, codes.reshape(2, 3, inputs))


def test_rows_are_filled_up_to_the_room_there_is_and_no_further():
    codes = drawn(3, 64, SPARSITY)
    longest = int(coded_lengths(codes).max())
    np.testing.assert_array_equal(decode(encode(codes, longest + 4), 64), codes)
    with pytest.raises(ValueError, match=f"needs {longest} codewords, and there is room for"):
        encode(codes, longest - 1)


def log_chance(values: int, others: int) -> float:
    """Of a run of that many values, so many of them not zero."""
    zero, other = math.log(SPARSITY), math.log((1 - SPARSITY) / 2)
    return (values - others) * zero + others * other


def test_the_dictionary_holds_the_likeliest_runs():
    assert len(runs()) == NUM_CODEWORDS  # all differ
    assert runs()[()] == 0
    assert max(map(len, runs())) == 2 * PAIRS
    assert all(run[:-2] in runs() for run in runs() if run)  # so the longest can be found in turn
    others = {run: len(run) - run.count(0) for run in runs()}
    least = min(log_chance(len(run), n) for run, n in others.items())
    pairs = {(a, b): (a != 0) + (b != 0) for a in VALUES for b in VALUES}
    for run, n in others.items():
        for pair, more in pairs.items():
            if len(run) < 2 * PAIRS and log_chance(len(run) + 2, n + more) > least + 1e-9:
                assert run + pair in runs()


def test_the_dictionary_never_changes():
    """Checkpoints on disk are read with it."""
    digest = hashlib.sha256(dictionary().entries.astype("<u4").tobytes()).hexdigest()
    assert digest == "89e5dc70e28c338139ae89a4e6ad85cbbb088dc269dd27a6216ef2cd54e5d45b"


@pytest.mark.parametrize(("zeros", "bits"), [(SPARSITY, 0.736), (0.93, 0.620), (0.8, 1.120)])
def test_the_rate_of_long_rows(zeros, bits):
    codes = drawn(16, 14336, zeros)
    assert 16 * coded_lengths(codes).mean() / 14336 == pytest.approx(bits, abs=0.01)
    chances = np.array([zeros, (1 - zeros) / 2, (1 - zeros) / 2])
    assert -(chances * np.log2(chances)).sum() < bits


def test_damage_to_lengths_is_found():
    codes = drawn(4, 128, SPARSITY)
    words = encode(codes, 9)
    entries = dictionary().entries
    assert is_sound(words, 128)
    assert not is_sound(words, 126)
    other = words.copy()
    other[1, 0] = int(words[1, 0]) ^ 0x8000
    assert (entries[other[1, 0], 1] >> 24) != (entries[words[1, 0], 1] >> 24)
    assert not is_sound(other, 128)
    moved = words.copy()
    moved[2] = np.roll(words[2], 1)  # padding first
    assert words[2, -1] == 0
    assert not is_sound(moved, 128)
