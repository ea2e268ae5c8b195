"""Every option of a server's sampler against plain numpy, and its silence where it is off."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixtral_jax.decode.controls import (
    Controls,
    Mask,
    RowControls,
    best_width,
    keep_typical,
    num_words,
    row_controls,
    sample_controlled,
)
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling, sample

V = 40
MARGIN = 1e-4
TOLERANCE = 1e-5

jitted = jax.jit(sample_controlled)
plain = jax.jit(sample)
typical = jax.jit(keep_typical)


def draw_logits(seed: int, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (rows, V)).astype(np.float32)


def no_mask(rows: int = 2) -> Mask:
    return Mask(np.zeros((rows, num_words(V)), np.uint32), np.zeros((rows,), np.bool_))


def controls(**fields) -> Controls:
    options = {k: fields.pop(k) for k in ("temperature", "top_k", "top_p") if k in fields}
    return Controls(options=SamplingOptions(**options), **fields)


def run(logits: np.ndarray, rows: RowControls, *, seen=None, counts=None, mask=None, step=0):
    B = len(logits)
    seen = np.zeros((B, V), np.bool_) if seen is None else seen
    counts = np.zeros((B, V), np.int32) if counts is None else counts
    return jitted(logits, seen, counts, rows, mask or no_mask(B), np.full((B,), step, np.int32))


def tokens_of(logits: np.ndarray, one: Controls, **state) -> list[int]:
    """Row 0 asks, row 1 asks for nothing."""
    sampled, _ = run(logits, row_controls([one, controls()], V), **state)
    return np.asarray(sampled.tokens).tolist()


@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.7, 3.0]), st.booleans())
def test_what_is_off_changes_nothing(seed, temperature, other_asks):
    logits = draw_logits(seed % 1000)
    seen = np.random.default_rng(seed).random((2, V)) < 0.3
    basic = SamplingOptions(
        temperature=temperature, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=seed
    )
    other = controls(
        frequency_penalty=1.0, logit_bias=((3, 5.0),), typical_p=0.5, wants_best=True, seed=2**40
    )
    rows = [Controls(options=basic, seed=seed, sample_id=2), other if other_asks else controls()]
    step = np.full((2,), 5, np.int32)
    ours, _ = run(logits, row_controls(rows, V), seen=seen, step=5)
    theirs = plain(logits, seen, row_sampling([basic, SamplingOptions()], [2, 0], V), step)
    assert ours.tokens[0] == theirs.tokens[0]
    assert ours.logprobs[0] == theirs.logprobs[0]


def test_bias_is_added_to_the_logits():
    logits = draw_logits(1)
    best = int(logits[0].argmax())
    worst = int(logits[0].argmin())
    assert tokens_of(logits, controls(logit_bias=((worst, 100.0),)))[0] == worst
    assert tokens_of(logits, controls(logit_bias=((best, -100.0),)))[0] != best
    gap = float(logits[0, best] - logits[0, worst])
    for value, token in ((gap + 0.01, worst), (gap - 0.01, best)):
        assert tokens_of(logits, controls(logit_bias=((worst, value),)))[0] == token
    # 300 pairs, and the neighbour's row is its own.
    every = tuple((i, float(i)) for i in range(V))
    got = tokens_of(logits, controls(logit_bias=every))
    assert got == [int((logits[0] + np.arange(V)).argmax()), int(logits[1].argmax())]


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_follow_openai(seed, frequency, presence):
    logits = draw_logits(seed)
    counts = np.random.default_rng(seed).integers(0, 4, (2, V)).astype(np.int32)
    expected = logits - counts * np.float32(frequency) - (counts > 0) * np.float32(presence)
    best_two = np.sort(expected[0])[-2:]
    assume(best_two[1] - best_two[0] > MARGIN)
    asked = controls(frequency_penalty=frequency, presence_penalty=presence)
    got = tokens_of(logits, asked, counts=counts)
    assert got == [int(expected[0].argmax()), int(logits[1].argmax())]


def reference_typical(scores: np.ndarray, mass: float, require=assume) -> np.ndarray:
    """Meister et al. 2022 as transformers' TypicalLogitsWarper has it."""
    finite = scores > -np.inf
    shares = np.where(finite, np.exp(scores.astype(np.float64) - scores.max()), 0)
    shares /= shares.sum()
    logs = np.log(np.where(shares > 0, shares, 1))
    distance = np.where(shares > 0, np.abs(-logs + (shares * logs).sum()), np.inf)
    order = np.argsort(distance, kind="stable")
    sums = np.cumsum(shares[order])
    require(bool((abs(sums - mass) > MARGIN).all()))
    last = min(int((sums < mass).sum()), V - 1)
    limit = distance[order[last]]
    near = np.abs(distance[np.isfinite(distance)] - limit)
    require(bool((near[near > 0] > MARGIN).all()))
    return (distance <= limit + MARGIN / 2) & finite


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.05, 0.98), st.booleans())
def test_typical_keeps_what_transformers_keeps(seed, mass, filtered):
    scores = draw_logits(seed)
    if filtered:
        scores[:, scores[0] < np.median(scores[0])] = -np.inf
    kept = np.asarray(typical(scores, np.asarray([mass, 1.0], np.float32)))
    assert (np.isfinite(kept[0]) == reference_typical(scores[0], mass)).all()
    np.testing.assert_array_equal(kept[1], scores[1])


def test_a_grammar_allows_only_its_tokens():
    logits = draw_logits(3)
    for allowed in ([5], [0, 31, 32, 39], list(range(7, 20))):
        mask = no_mask()
        for token in allowed:
            mask.bits[0, token // 32] |= np.uint32(1) << np.uint32(token % 32)
        mask.is_on[0] = True
        best = max(allowed, key=lambda t: logits[0, t])
        assert tokens_of(logits, controls(), mask=mask) == [best, int(logits[1].argmax())]
        for seed in range(20):
            warm = controls(temperature=5.0, seed=seed)
            assert tokens_of(logits, warm, mask=mask)[0] in allowed


def test_upper_halves_of_seeds_count():
    logits = np.zeros((2, V), np.float32)

    def drawn(seed: int) -> list[int]:
        return [
            int(
                run(logits, row_controls([controls(temperature=1.0, seed=seed)] * 2, V), step=s)[
                    0
                ].tokens[0]
            )
            for s in range(8)
        ]

    streams = {tuple(drawn(seed)) for seed in (1, 1 + 2**32, 1 + 2**63, 2**32, 2**64 - 1)}
    assert len(streams) == 5
    assert drawn(1 + 2**32) in [list(s) for s in streams]


@pytest.mark.parametrize("wants", [True, False])
def test_the_likeliest_tokens_are_those_of_the_raw_logits(wants):
    logits = draw_logits(4)
    asked = controls(logit_bias=((0, 50.0),), wants_best=wants)
    sampled, best = run(logits, row_controls([asked, controls()], V))
    width = best_width(V)
    if not wants:
        assert not np.asarray(best.logprobs).any()
        return
    logs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    expected = np.argsort(-logs, axis=-1)[:, :width]
    np.testing.assert_array_equal(best.ids, expected)
    np.testing.assert_allclose(
        best.logprobs, np.take_along_axis(logs, expected, axis=-1), atol=TOLERANCE
    )
    assert int(sampled.tokens[0]) == 0
    np.testing.assert_allclose(sampled.logprobs[0], logs[0, 0], atol=TOLERANCE)


def is_clear(it: bool) -> None:
    assert it, "draw other logits"


def test_frequencies_follow_every_filter_together():
    """4,000 draws: probabilities of what is left after bias, penalties, grammar, top-k, typical."""
    rows, logits = 500, np.repeat(draw_logits(9, 1), 500, axis=0)
    counts = np.zeros((rows, V), np.int32)
    counts[:, :10] = 1
    mask = Mask(np.full((rows, num_words(V)), 0xFFFFFFF0, np.uint32), np.ones((rows,), np.bool_))
    fields = {"temperature": 2.0, "top_k": 12, "typical_p": 0.9, "presence_penalty": 0.5}
    scores = logits[0] + 2.0 * (np.arange(V) == 7) - 0.5 * (np.arange(V) < 10)
    scores[:4] = -np.inf
    scores /= 2.0
    scores[scores < np.sort(scores)[-12]] = -np.inf
    scores[~reference_typical(scores, 0.9, require=is_clear)] = -np.inf
    expected = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    one = functools.partial(controls, logit_bias=((7, 2.0),), **fields)
    found = np.zeros(V)
    for step in range(8):
        asked = row_controls([one(seed=seed) for seed in range(rows)], V)
        sampled, _ = run(logits, asked, counts=counts, mask=mask, step=step)
        found += np.bincount(np.asarray(sampled.tokens), minlength=V)
    assert not found[expected == 0].any()
    deviation = np.sqrt(expected * (1 - expected) / found.sum())
    assert (abs(found / found.sum() - expected) < 5 * deviation + 1e-9).all()
