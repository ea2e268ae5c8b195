"""A fixed dictionary for rows of ternary values, most of which are zero, as QMoE has it.

Frantar and Alistarh 2023, "QMoE: Practical Sub-1-Bit Compression of Trillion-Parameter Models"
(arXiv 2310.16795), section 4: a codeword of 16 bits stands for a run of up to 14 pairs of values.
The dictionary holds the runs that are likeliest where each value is zero with probability 0.885
and plus or minus one alike; it is the same for all weights. Each row is coded by itself, from its
beginning, always with the longest run that fits.

Ours keeps codeword 0 for the empty run, so that rows of different length fill one array.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, UInt16

SPARSITY = 0.885
PAIRS = 14  # of the longest run
NUM_CODEWORDS = 1 << 16
_DIGITS = (0, 1, 2)  # stand for 0, 1 and -1
_FIRST_WORD = 16  # values in the first of the two words of an entry; the second has the length too
_LENGTH_AT = 24


class Dictionary(NamedTuple):
    """The runs by codeword.

    Attributes:
        entries: uint32 ``[65536, 2]``: values of two bits (0, 1 and 2 for 0, 1 and -1) from the
            low bits of the first word on, 16 in the first; bits 24 on of the second: their number.
        steps: int32 ``[65536 * 9]``: with a run read so far and one pair more, at ``9 * codeword +
            3 * first + second``: the codeword of the run of both; where there is none, minus the
            codeword of the pair alone.
    """

    entries: np.ndarray
    steps: np.ndarray


def _kept() -> tuple[list[int], tuple[int, int], int]:
    """Which runs are in the dictionary, by the number of their pairs and of values not zero.

    Returns:
        For 0 to 14 pairs, the most values not zero of runs that are all in it; then the pairs and
        values not zero of those of which only the first are, and how many.
    """
    zero, other = math.log(SPARSITY), math.log((1 - SPARSITY) / 2)
    kinds = [(pairs, n) for pairs in range(1, PAIRS + 1) for n in range(2 * pairs + 1)]
    kinds.sort(key=lambda kind: -((2 * kind[0] - kind[1]) * zero + kind[1] * other))
    most, room = [0] + [-1] * PAIRS, NUM_CODEWORDS - 1
    for pairs, n in kinds:
        count = math.comb(2 * pairs, n) << n
        if count > room:
            return most, (pairs, n), room
        most[pairs], room = n, room - count
    raise AssertionError("there are more runs than codewords")


@functools.cache
def dictionary() -> Dictionary:
    """The dictionary; codewords count runs by length, then in the order of their digits."""
    most, (last_pairs, last_n), room = _kept()
    entries = np.zeros((NUM_CODEWORDS, 2), np.uint32)
    children = np.zeros((NUM_CODEWORDS, 9), np.int32)
    pairs_of = np.array([(a, b) for a in _DIGITS for b in _DIGITS], np.uint8)
    runs, words, start = np.zeros((1, 0), np.uint8), np.zeros(1, np.int64), 1
    for pairs in range(1, PAIRS + 1):
        longer = np.concatenate([runs.repeat(9, 0), np.tile(pairs_of, (len(runs), 1))], axis=1)
        n = (longer != 0).sum(axis=1)
        is_kept = n <= most[pairs]
        if pairs == last_pairs:
            is_kept[np.flatnonzero(n == last_n)[:room]] = True
        stop = start + int(is_kept.sum())
        parents = words.repeat(9)[is_kept]
        words = np.arange(start, stop)
        children[parents, np.tile(np.arange(9), len(runs))[is_kept]] = words
        runs, start = longer[is_kept], stop
        digits = runs.astype(np.uint32)
        places = np.arange(2 * pairs, dtype=np.uint32) % _FIRST_WORD * 2
        entries[words, 0] = (digits << places)[:, :_FIRST_WORD].sum(axis=1)
        entries[words, 1] = (digits << places)[:, _FIRST_WORD:].sum(axis=1)
        entries[words, 1] |= np.uint32(2 * pairs << _LENGTH_AT)
    assert start == NUM_CODEWORDS
    alone = -np.tile(children[0], (NUM_CODEWORDS, 1))
    return Dictionary(entries, np.where(children > 0, children, alone).reshape(-1))


def _pairs(codes: np.ndarray) -> np.ndarray:
    """The pairs of rows ``[O, I]`` as numbers 0 to 8, ``[ceil(I / 2), O]``."""
    digits = (codes % 3).astype(np.int32).T
    if len(digits) % 2:
        digits = np.concatenate([digits, np.zeros_like(digits[:1])])
    return 3 * digits[0::2] + digits[1::2]


def coded_lengths(codes: np.ndarray) -> np.ndarray:
    """Codewords that each row ``[O, I]`` of -1, 0 and 1 needs; int64 ``[O]``."""
    steps = dictionary().steps
    word = np.zeros(len(codes), np.int32)
    counts = np.full(len(codes), min(1, codes.shape[1]), np.int64)
    for pair in _pairs(codes):
        step = steps[9 * word + pair]
        counts += step < 0
        word = np.abs(step)
    return counts


def encode(codes: np.ndarray, size: int | None = None) -> np.ndarray:
    """Codewords of rows ``[O, I]`` of -1, 0 and 1; of an odd number, a zero more is coded.

    Args:
        codes: of any integer dtype.
        size: codewords of a row; those of the longest row unless given.

    Returns:
        uint16 ``[O, size]``: each row from its beginning, then codeword 0.

    Raises:
        ValueError: if a row needs more.
    """
    lengths = coded_lengths(codes)
    longest = int(lengths.max(initial=0))
    size = longest if size is None else size
    if longest > size:
        raise ValueError(f"a row needs {longest} codewords, and there is room for {size}")
    found = np.zeros((len(codes), size), np.uint16)
    steps, rows = dictionary().steps, np.arange(len(codes))
    word, at = np.zeros(len(codes), np.int32), np.zeros(len(codes), np.int64)
    for pair in _pairs(codes):
        step = steps[9 * word + pair]
        is_end = step < 0
        found[rows[is_end], at[is_end]] = word[is_end]
        at += is_end
        word = np.abs(step)
    if size:
        found[rows, at] = word
    return found


def _lengths_of(words: np.ndarray) -> np.ndarray:
    return (dictionary().entries[:, 1] >> _LENGTH_AT).astype(np.int64)[words]


def used(words: np.ndarray) -> int:
    """How many of the codewords ``[..., size]`` are not padding."""
    return int(np.count_nonzero(words))


def is_sound(words: np.ndarray, num_inputs: int) -> bool:
    """Whether all rows of codewords ``[..., size]`` are of that many values, padding at their ends.

    A codeword in place of another of the same length is not found: digests are there for that.
    """
    lengths = _lengths_of(words)
    is_padding = lengths == 0
    padded_last = not (is_padding[..., :-1] & ~is_padding[..., 1:]).any()
    return padded_last and bool((lengths.sum(axis=-1) == num_inputs + num_inputs % 2).all())


def decode(words: np.ndarray, num_inputs: int) -> np.ndarray:
    """The rows that ``encode`` coded; int8 ``[..., I]`` for codewords ``[..., size]``."""
    *rows, size = words.shape
    flat = words.reshape(-1, size)
    lengths = _lengths_of(flat)
    found = np.zeros((len(flat), num_inputs + 2 * PAIRS), np.int8)
    starts = lengths.cumsum(axis=1) - lengths
    at = np.arange(len(flat))[:, None]
    entries = dictionary().entries[flat]
    for j in range(2 * PAIRS):
        word, place = divmod(j, _FIRST_WORD)
        digit = (entries[..., word] >> np.uint32(2 * place)) & 3
        value = (digit & 1).astype(np.int8) - (digit >> 1).astype(np.int8)
        is_value = (j < lengths) & (starts < num_inputs)
        found[np.broadcast_to(at, starts.shape)[is_value], (starts + j)[is_value]] = value[is_value]
    return found[:, :num_inputs].reshape(*rows, num_inputs)


@functools.partial(jax.jit, static_argnames="num_inputs")
def decode_on_device(words: UInt16[Array, "*rows size"], num_inputs: int) -> Int8[Array, "*rows I"]:
    """``decode`` in JAX, with shapes that depend on no codeword.

    Codeword after codeword, all rows at once: each writes as many values as the longest run has,
    from where its run begins, and the next one writes over what was too much.
    """
    *rows, size = words.shape
    flat = words.reshape(-1, size)
    entries = jnp.asarray(dictionary().entries)[flat]
    lengths = (entries[..., 1] >> _LENGTH_AT).astype(jnp.int32)
    starts = lengths.cumsum(axis=1) - lengths
    j = np.arange(2 * PAIRS)
    places = jnp.asarray(j % _FIRST_WORD * 2, jnp.uint32)

    def write(row: jax.Array, run: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row, run, (start,))

    def write_all(k: jax.Array, found: jax.Array) -> jax.Array:
        digits = (entries[:, k][:, j // _FIRST_WORD] >> places) & 3
        values = (digits & 1).astype(jnp.int8) - (digits >> 1).astype(jnp.int8)
        return jax.vmap(write)(found, values, starts[:, k])

    # One more for the zero that fills up an odd row. Not plain zeros: inside shard_map they must
    # vary over the axes that the codewords vary over.
    end = num_inputs + 2 * PAIRS + 1
    blank = jnp.broadcast_to((flat[:, :1] & 0).astype(jnp.int8), (len(flat), end))
    found = jax.lax.fori_loop(0, size, write_all, blank)
    return found[:, :num_inputs].reshape(*rows, num_inputs)
