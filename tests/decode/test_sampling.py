"""The sampler against a plain numpy reference, its laws, and what its options refuse."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixtral_jax.decode.sampling import (
    NUM_SEEDS,
    SamplingOptions,
    keep_likely,
    penalize,
    row_sampling,
    sample,
)
from mixtral_jax.errors import USAGE, MixtralError

V = 8
PROBABILITY_TOLERANCE = 1e-5
LOGPROB_TOLERANCE = 1e-5
# A filter's sum this near its limit may fall on either side in f32.
MARGIN = 1e-4

FEWER = settings(max_examples=40)

jitted = jax.jit(sample)


@jax.jit
def likely_of(logits, seen, rows):
    return keep_likely(penalize(logits, seen, rows.repetition_penalty), rows)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


def kept_by_top_p(scores: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of best tokens that reaches ``top_p``, and tokens equal to its worst."""
    best_first = np.argsort(-scores, kind="stable")
    before = np.cumsum(softmax(scores)[best_first]) - softmax(scores)[best_first]
    assume((abs(before[1:] - top_p) > MARGIN).all())
    num_kept = max(1, int((before < top_p).sum()))
    return scores >= scores[best_first[num_kept - 1]]


def reference(logits: np.ndarray, seen: np.ndarray, options: SamplingOptions) -> np.ndarray:
    """Probabilities in the order of transformers: penalty, temperature, top-k, top-p, min-p."""
    scores, penalty = logits.copy(), np.float32(options.repetition_penalty)
    scores[seen & (logits < 0)] *= penalty
    scores[seen & (logits >= 0)] /= penalty
    scores /= np.float32(options.temperature)
    if options.top_k is not None:
        scores[scores < np.sort(scores)[::-1][: options.top_k][-1]] = -np.inf
    if options.top_p is not None and options.top_p < 1:
        scores[~kept_by_top_p(scores, options.top_p)] = -np.inf
    if options.min_p is not None:
        ratio = softmax(scores) / softmax(scores).max()
        assume((abs(ratio - options.min_p)[ratio < 1] > MARGIN).all())
        scores[ratio < options.min_p] = -np.inf
    return softmax(scores)


# Quarters tie often.
logit_rows = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=V, max_size=V).map(
    lambda row: np.asarray(row, np.float32)
)
seen_rows = st.lists(st.booleans(), min_size=V, max_size=V).map(np.asarray)
# Fields, not SamplingOptions: its type check draws random numbers, which strategies may not.
warm_fields = st.fixed_dictionaries(
    {
        "temperature": st.floats(0.1, 3.0),
        "top_k": st.none() | st.integers(1, V + 2),
        "top_p": st.none() | st.just(1.0) | st.floats(0.01, 1.0),
        "min_p": st.none() | st.floats(0.0, 1.0),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 2.0, 0.5]),
        "seed": st.integers(0, NUM_SEEDS - 1),
    }
)
any_fields = warm_fields | st.fixed_dictionaries({"seed": st.integers(0, 9)})


def probabilities(logits: np.ndarray, seen: np.ndarray, options: SamplingOptions) -> np.ndarray:
    rows = row_sampling([options] * 2, [0, 0], V)
    likely = likely_of(jnp.stack([logits] * 2), jnp.stack([seen] * 2), rows)
    return softmax(np.asarray(likely[0]))


@given(logit_rows, seen_rows, warm_fields)
def test_matches_the_reference(logits, seen, fields):
    options = SamplingOptions(**fields)
    expected = reference(logits, seen, options)
    got = probabilities(logits, seen, options)
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, atol=PROBABILITY_TOLERANCE)


def test_repetition_penalty_lowers_both_signs():
    logits = jnp.asarray([[2.0, -2.0, 2.0, -2.0, 0.0]])
    seen = jnp.asarray([[True, True, False, False, True]])
    penalized = penalize(logits, seen, jnp.asarray([2.0]))
    np.testing.assert_array_equal(penalized, [[1.0, -4.0, 2.0, -2.0, 0.0]])


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, 8),
        ({"top_k": 3}, 3),
        ({"top_k": 1}, 1),
        ({"top_k": V}, 8),
        ({"top_k": V + 100}, 8),
        ({"top_p": 1e-6}, 1),  # never none
        ({"top_p": 1.0}, 8),
        ({"top_p": 0.49}, 1),
        ({"top_p": 0.51}, 2),
        ({"top_p": 0.6}, 2),
        # Of the best two, the first has 2/3: without renormalisation both would be kept.
        ({"top_k": 2, "top_p": 0.6}, 1),
        ({"min_p": 0.0}, 8),
        ({"min_p": 0.3}, 2),
        ({"min_p": 1.0}, 1),
    ],
    ids=str,
)
def test_filters_keep_as_many_as_expected(fields, kept):
    # Probabilities 1/2, 1/4, 1/8, ...: the last two are alike.
    logits = np.log(np.asarray([0.5**n for n in range(1, V)] + [0.5 ** (V - 1)], np.float32))
    got = probabilities(logits, np.zeros(V, bool), SamplingOptions(temperature=1.0, **fields))
    assert (got > 0).sum() == kept
    assert (got[:kept] > 0).all()


@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}], ids=str)
def test_equal_tokens_are_kept_or_rejected_together(fields):
    logits = np.asarray([3, 1, 1, 1, 3 - 0.01, 1, 1, 3 - 0.01], np.float32)
    got = probabilities(logits, np.zeros(V, bool), SamplingOptions(temperature=1.0, **fields))
    assert (np.flatnonzero(got) == [0, 4, 7]).all()


@FEWER
@given(logit_rows, seen_rows, warm_fields, st.floats(0.01, 1.0))
def test_laws_of_the_filters(logits, seen, fields, less):
    options = SamplingOptions(**fields)
    got = probabilities(logits, seen, options)
    kept, plain = got > 0, dataclasses.replace(options, top_k=None, top_p=None, min_p=None)
    unfiltered = probabilities(logits, seen, plain)
    assert kept[unfiltered.argmax()]
    assert (unfiltered > 0).all()
    if not kept.all():
        assert unfiltered[kept].min() > unfiltered[~kept].max()
    top_p = 1.0 if options.top_p is None else options.top_p
    narrower = probabilities(logits, seen, dataclasses.replace(options, top_p=top_p * less))
    assert (kept | (narrower == 0)).all()


class Drawn(NamedTuple):
    tokens: np.ndarray
    logprobs: np.ndarray
    is_bad: np.ndarray


def draw(logits, seen, options, *, sample_ids=None, steps=None) -> Drawn:
    B = len(options)
    rows = row_sampling(options, sample_ids or [0] * B, logits.shape[1])
    sampled = jitted(
        jnp.asarray(logits), jnp.asarray(seen), rows, jnp.asarray(steps or [0] * B, jnp.int32)
    )
    return Drawn(*map(np.asarray, sampled))


@FEWER
@given(logit_rows, seen_rows, st.sampled_from([1.0, 1.5]))
def test_greedy_is_the_best_token_after_the_penalty(logits, seen, penalty):
    greedy = SamplingOptions(repetition_penalty=penalty)
    warm = SamplingOptions(temperature=2.0)
    drawn = draw(np.stack([logits] * 2), np.stack([seen] * 2), [greedy, warm])
    factors = np.where(seen, np.float32(penalty), np.float32(1))
    best = np.where(logits < 0, logits * factors, logits / factors)
    assert drawn.tokens[0] == best.argmax()


@FEWER
@given(logit_rows, seen_rows, any_fields)
def test_logprobs_are_those_of_the_raw_logits(logits, seen, fields):
    options = SamplingOptions(**fields)
    drawn = draw(np.stack([logits] * 2), np.stack([seen] * 2), [options] * 2)
    expected = np.log(softmax(logits))[drawn.tokens]
    np.testing.assert_allclose(drawn.logprobs, expected, atol=LOGPROB_TOLERANCE)
    assert not drawn.is_bad.any()


row_of_a_batch = st.tuples(
    logit_rows, seen_rows, any_fields, st.integers(0, 9), st.integers(0, 2000)
)


def draw_rows(rows: list) -> Drawn:
    logits, seen, fields, sample_ids, steps = map(list, zip(*rows, strict=True))
    options = [SamplingOptions(**f) for f in fields]
    return draw(np.stack(logits), np.stack(seen), options, sample_ids=sample_ids, steps=steps)


@FEWER
@given(row_of_a_batch, st.lists(row_of_a_batch, min_size=3, max_size=3), st.integers(0, 3))
def test_a_row_does_not_see_its_neighbours(row, others, place):
    alone = draw_rows([row, row])
    among = draw_rows([*others[:place], row, *others[place:]])
    assert among.tokens[place] == alone.tokens[0] == alone.tokens[1]
    assert among.logprobs[place] == pytest.approx(alone.logprobs[0], abs=LOGPROB_TOLERANCE)


@pytest.mark.parametrize("what", ["seed", "sample_id", "step", "nothing"])
def test_seed_sample_and_step_each_change_the_tokens(what):
    B, vocab = 64, 512
    numbers = list(range(B))
    seeds = numbers if what == "seed" else [7] * B
    drawn = draw(
        np.zeros((B, vocab), np.float32),
        np.zeros((B, vocab), bool),
        [SamplingOptions(temperature=1.0, seed=seed) for seed in seeds],
        sample_ids=numbers if what == "sample_id" else [7] * B,
        steps=numbers if what == "step" else [7] * B,
    )
    if what == "nothing":
        assert len(set(drawn.tokens.tolist())) == 1
    else:  # 64 of 512 without replacement in expectation: 60
        assert len(set(drawn.tokens.tolist())) > 48


def test_the_highest_seeds_differ():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    zeros = np.zeros((len(seeds), 512), np.float32)
    options = [SamplingOptions(temperature=1.0, seed=seed) for seed in seeds]
    drawn = draw(zeros, zeros.astype(bool), options)
    assert len(set(drawn.tokens.tolist())) == len(seeds)


@pytest.mark.parametrize("what", ["seed", "sample_id", "step"])
def test_frequencies_match_the_probabilities(what):
    B, chi_square_limit = 4096, 30.0  # 3 degrees of freedom: once in a million
    numbers, same = list(range(B)), [5] * B
    logits = np.asarray([1.0, 0.5, 0.0, -0.5, -9.0, 0.2, -1.0, -2.0], np.float32)
    fields = {"temperature": 0.8, "top_k": 4}
    drawn = draw(
        np.tile(logits, (B, 1)),
        np.zeros((B, V), bool),
        [SamplingOptions(seed=s, **fields) for s in (numbers if what == "seed" else same)],
        sample_ids=numbers if what == "sample_id" else same,
        steps=numbers if what == "step" else same,
    )
    expected = B * reference(logits, np.zeros(V, bool), SamplingOptions(**fields))
    counts = np.bincount(drawn.tokens, minlength=V)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    assert kept.sum() == 4

    def chi_square(expected: np.ndarray) -> float:
        return float(((counts - expected)[kept] ** 2 / expected[kept]).sum())

    assert chi_square(expected) < chi_square_limit
    # The test sees a wrong temperature.
    wrong = SamplingOptions(temperature=1.1, top_k=4)
    assert chi_square(B * reference(logits, np.zeros(V, bool), wrong)) > chi_square_limit


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_unusable_logits_fails_alone(fault, temperature):
    options = [SamplingOptions(temperature=temperature, seed=seed) for seed in range(4)]
    logits = np.random.default_rng(0).standard_normal((4, V), np.float32)
    seen = np.zeros((4, V), bool)
    whole = draw(logits, seen, options)
    broken = logits.copy()
    broken[2, slice(None) if fault == -np.inf else 3] = fault
    drawn = draw(broken, seen, options)
    assert whole.is_bad.tolist() == [False] * 4
    assert drawn.is_bad.tolist() == [False, False, True, False]
    others = [0, 1, 3]
    np.testing.assert_array_equal(drawn.tokens[others], whole.tokens[others])
    np.testing.assert_array_equal(drawn.logprobs[others], whole.logprobs[others])


def test_one_rejected_token_is_no_fault():
    logits = np.zeros((2, V), np.float32)
    logits[:, 1:] = -np.inf
    drawn = draw(logits, np.zeros((2, V), bool), [SamplingOptions(temperature=1.0)] * 2)
    assert not drawn.is_bad.any()
    assert drawn.tokens.tolist() == [0, 0]


def test_every_mix_of_options_meets_one_program():
    fresh: Any = jax.jit(functools.partial(sample))  # a cache of its own
    mixes = [
        [SamplingOptions(), SamplingOptions()],
        [SamplingOptions(temperature=1), SamplingOptions(ignore_eos=True)],
        [SamplingOptions(temperature=0.5, top_k=3, seed=9), SamplingOptions(top_p=0.5)],
        [SamplingOptions(temperature=1, min_p=0.1), SamplingOptions(repetition_penalty=1.2)],
    ]
    step = jnp.zeros((2,), jnp.int32)
    for mix in mixes:
        rows = row_sampling(mix, [0, 1], V)
        fresh(jnp.zeros((2, V)), jnp.zeros((2, V), bool), rows, step)
    assert fresh._cache_size() == 1
    rows = row_sampling(mixes[0] * 2, [0] * 4, V)
    fresh(jnp.zeros((4, V)), jnp.zeros((4, V), bool), rows, jnp.zeros((4,), jnp.int32))
    assert fresh._cache_size() == 2, "the count sees another shape"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": True},
        {"temperature": -1.0},
        {"temperature": -1e-9},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.0000001},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": float("nan")},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
        {"seed": NUM_SEEDS},
        {"stop": ("",)},
        {"stop": ("fine", "")},
        {"num_samples": 0},
    ],
    ids=str,
)
def test_options_out_of_bounds_are_refused(fields):
    with pytest.raises(MixtralError) as caught:
        SamplingOptions(**fields)
    assert caught.value.code == USAGE
    (name,) = fields
    assert str(caught.value).startswith("--" + name.replace("_", "-") + ": expected")


@pytest.mark.parametrize(
    "fields",
    [
        {"max_new_tokens": 1},
        {"temperature": 0},
        {"temperature": 1},
        {"top_k": 1},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"min_p": 0},
        {"min_p": 1},
        {"repetition_penalty": 1},
        {"seed": 0},
        {"seed": NUM_SEEDS - 1},
        {"stop": ("a", "b")},
    ],
    ids=str,
)
def test_options_at_their_bounds_are_accepted(fields):
    options = SamplingOptions(**fields)
    assert {name: getattr(options, name) for name in fields} == fields
