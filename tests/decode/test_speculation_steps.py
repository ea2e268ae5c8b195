"""The parts of speculation: finding a draft, reading one, and the verdict whether it pays."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from mixtral_jax.decode import steps
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling
from mixtral_jax.decode.speculation import LOSSES, Payoff, find_draft
from mixtral_jax.decode.steps import DecodeState, Draft, Limits, Wrote
from mixtral_jax.kernels.attention import EMPTY
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.model.transformer import assemble
from tests.models import random_leaves

F32 = 1e-4
K, ROWS, SLOTS, NAN = 4, 2, 24, 50
PROMPT = (3, 4, 5, 6, 7)


def expected_draft(ids: list[int], num_drafts: int) -> list[int]:
    """The contract of find_draft, in plain Python."""
    for size in (3, 2):
        for end in range(len(ids) - 2, size - 2, -1):
            if ids[end - size + 1 : end + 1] == ids[-size:]:
                cycle = ids[end + 1 :]
                return [cycle[i % len(cycle)] for i in range(num_drafts)]
    return []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(-1, 5))
def test_drafts_follow_the_last_occurrence(ids, most):
    history = np.full((2, 20), 3, np.int32)  # what stands past the end matters to nobody
    history[0, : len(ids)] = ids
    lengths = jnp.asarray([len(ids), 1])
    find = functools.partial(jax.jit(find_draft, static_argnames="num_drafts"), num_drafts=K)
    draft = find(jnp.asarray(history), lengths, jnp.asarray([most, most]))
    want = expected_draft(ids, min(max(most, 0), K))
    assert draft.tokens[0, : draft.counts[0]].tolist() == want
    assert draft.counts[1] == 0


class Reader:
    """A model at the end of a prompt, in both rows; tokens of id NAN are damaged."""

    def __init__(self, config, eos: tuple[int, ...] = ()):
        leaves = random_leaves(config)
        leaves["embed_tokens"] = leaves["embed_tokens"].at[NAN].set(jnp.nan)
        self.model = assemble(config, leaves)
        state = steps.empty_state(
            config,
            np.full(ROWS, PROMPT[-1], np.int32),
            np.zeros(ROWS, bool),
            slots=SLOTS,
            dtype=jnp.float32,
            placement=LOCAL,
        )
        tokens = np.tile(np.asarray(PROMPT[:-1], np.int32), (ROWS, 1))
        counts = np.full(ROWS, len(PROMPT) - 1, np.int32)
        self.start = steps.prefill(self.model, state, tokens, counts, placement=LOCAL)
        self._read = jax.jit(functools.partial(steps.write_tokens, placement=LOCAL))

    def read(
        self,
        state: DecodeState,
        draft: list[list[int]],
        *,
        eos: int = -1,
        budget: int = 10,
        **fields,
    ) -> tuple[DecodeState, Wrote]:
        """One step with these drafts."""
        longest = max(map(len, draft))
        tokens = np.zeros((ROWS, longest), np.int32)
        for row, ids in enumerate(draft):
            tokens[row, : len(ids)] = ids
        counts = np.asarray([len(ids) for ids in draft], np.int32)
        rows = row_sampling([SamplingOptions(**fields)] * ROWS, [0] * ROWS, 64)
        limits = Limits(np.full(ROWS, budget, np.int32), np.zeros(ROWS, bool), np.array([eos]))
        draft_of = Draft(jnp.asarray(tokens), jnp.asarray(counts))
        return self._read(self.model, state, draft_of, rows, limits)

    def plain(self, count: int, **fields) -> tuple[list[int], DecodeState]:
        """The first row's tokens without drafts, and the state."""
        state, written = self.start, []
        for _ in range(count):
            state, wrote = self.read(state, [[], []], **fields)
            written.append(int(wrote.emitted.tokens[0, 0]))
        return written, state


@pytest.fixture(scope="module")
def reader(small_config):
    return Reader(small_config(initializer_range=0.2, num_local_experts=2))


def written(wrote: Wrote, row: int = 0) -> list[int]:
    return wrote.emitted.tokens[row, : wrote.emitted.counts[row]].tolist()


def check_same_state(got: DecodeState, want: DecodeState) -> None:
    """Keys and values too, those in slots that hold nothing included."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=F32), got, want)


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 1.0, "repetition_penalty": 1.5, "top_k": 9}]
)
def test_a_met_draft_is_written_at_once_and_leaves_the_same_state(reader, fields):
    want, state = reader.plain(K + 1, **fields)
    got, wrote = reader.read(reader.start, [want[:K], want[:K]], **fields)
    assert written(wrote) == written(wrote, 1) == want
    check_same_state(got, state)


@pytest.mark.parametrize("wrong", range(K))
def test_a_wrong_token_ends_the_run_and_leaves_no_trace(reader, wrong):
    want, state = reader.plain(wrong + 1)
    ahead = reader.plain(K)[0]
    draft = [*ahead[:wrong], (ahead[wrong] + 1) % NAN, *ahead[wrong + 1 :]]
    got, wrote = reader.read(reader.start, [draft, draft])
    assert written(wrote) == want
    check_same_state(got, state)
    assert (np.asarray(got.cache.positions) != EMPTY).sum() == ROWS * (len(PROMPT) + wrong)


def test_rows_have_drafts_of_their_own(reader):
    want, _ = reader.plain(K + 1)
    wrong = [(want[0] + 1) % NAN]
    got, wrote = reader.read(reader.start, [want[:2], wrong])
    assert (written(wrote), written(wrote, 1)) == (want[:3], want[:1])
    assert got.cache.lengths.tolist() == [len(PROMPT) + 2, len(PROMPT)]


def test_an_end_inside_a_run_cuts_it(reader):
    want, _ = reader.plain(K + 1)
    end = want[2]
    first = want.index(end)
    got, wrote = reader.read(reader.start, [want[:K], []], eos=end)
    assert written(wrote) == want[: first + 1]
    assert got.is_done[0]
    assert got.token[0] == end
    _, wrote = reader.read(reader.start, [want[:K], []], eos=end, ignore_eos=True)
    assert written(wrote) == want


@pytest.mark.parametrize("budget", range(1, K + 3))
def test_a_budget_inside_a_run_cuts_it(reader, budget):
    want, _ = reader.plain(K + 1)
    got, wrote = reader.read(reader.start, [want[:K], want[:K]], budget=budget)
    assert written(wrote) == want[:budget]
    assert got.is_done.tolist() == [budget <= K + 1] * 2


def test_nan_of_a_draft_is_not_the_row_s(reader):
    """The row writes nothing, is not bad, and goes on without a draft as if nothing had been."""
    want, state = reader.plain(2)
    got, wrote = reader.read(reader.start, [[want[0], NAN], [want[0]]])
    assert wrote.is_refused.tolist() == [True, False]
    assert (written(wrote), written(wrote, 1)) == ([], want)
    assert not got.is_bad.any()
    assert not got.is_done.any()
    jax.tree.map(lambda x: np.testing.assert_equal(np.isfinite(x).all(), True), got.cache)
    for _ in range(2):
        got, wrote = reader.read(got, [[], []])
        assert not wrote.is_refused.any()
    assert written(wrote) == want[1:]
    check_same_state(*(jax.tree.map(lambda x: x[:1], s.cache) for s in (got, state)))


def test_rows_that_are_done_read_nothing(reader):
    done = reader.start._replace(is_done=jnp.asarray([True, False]))
    want, _ = reader.plain(2)
    got, wrote = reader.read(done, [want[:1], want[:1]])
    assert (written(wrote), written(wrote, 1)) == ([], want)
    first = lambda state: jax.tree.map(lambda x: x[0], state.cache)  # noqa: E731
    check_same_state(first(got), first(done))


def verdicts(payoff: Payoff, calls: list[tuple[float, float]]) -> list[bool]:
    """Which calls were trials, given seconds per token with drafts and without."""
    trials = []
    for drafted, plain in calls:
        is_trial = payoff.wants_trial
        trials.append(is_trial)
        tokens = 8 if is_trial or not payoff.is_on else 24
        seconds = tokens * (plain if is_trial else drafted)
        payoff.add(seconds, steps=8, row_steps=8, drafted=0 if is_trial else 16, tokens=tokens)
    return trials


def test_what_pays_stays_on_after_one_trial():
    payoff = Payoff()
    assert verdicts(payoff, [(1.0, 1.1)] * 6) == [False, True, False, False, False, False]
    assert payoff.is_on


def test_what_does_not_pay_is_switched_off_after_a_second_look():
    payoff = Payoff()
    assert verdicts(payoff, [(1.0, 0.9)] * 3) == [False, True, False]
    assert payoff.is_on
    assert verdicts(payoff, [(1.0, 0.9)] * 3) == [True, False, False]
    assert not payoff.is_on


def test_one_slow_call_is_forgiven():
    payoff = Payoff()
    good, slow = (1.0, 1.1), (5.0, 1.1)
    verdicts(payoff, [good, good, slow, good, good, slow, good, good])
    assert payoff.is_on
    assert LOSSES == 2


def test_the_first_call_may_be_slow_but_not_the_later_ones():
    payoff = Payoff()
    verdicts(payoff, [(1.0, 1.1), (1.0, 1.1), (2.0, 1.1), (2.0, 1.1), (2.0, 1.1)])
    assert not payoff.is_on


def test_calls_without_a_draft_settle_nothing():
    """A text that repeats nothing yet: noise alone must not switch off what may pay later."""
    payoff, noise = Payoff(), np.random.default_rng(0)
    for _ in range(500):
        assert not payoff.wants_trial
        payoff.add(1 + 0.03 * noise.normal(), steps=8, row_steps=8, drafted=0, tokens=8)
    assert payoff.is_on
    verdicts(payoff, [(1.0, 1.1)] * 6)
    assert payoff.is_on


def test_a_difference_within_the_noise_switches_nothing_off():
    payoff = Payoff()
    verdicts(payoff, [(1.0 + 0.02 * (-1) ** k, 1.0) for k in range(200)])
    assert payoff.is_on


def test_rows_that_have_ended_do_not_count():
    """The same seconds per step and tokens per row, in a call with half of the rows."""
    payoff = Payoff()
    payoff.add(8.0, steps=8, row_steps=16, drafted=32, tokens=48)  # two rows, 3 tokens a step
    payoff.add(4.0, steps=8, row_steps=8, drafted=0, tokens=8)  # one row, plain, half as long
    payoff.add(8.0, steps=8, row_steps=8, drafted=16, tokens=24)  # one row, 3 tokens a step
    assert payoff.is_on
    assert not payoff.wants_trial, "2/3 of the seconds per token: no doubt to settle"


def test_calls_are_short_until_drafts_have_paid():
    payoff = Payoff()
    assert payoff.wants_short
    verdicts(payoff, [(1.0, 1.1), (1.0, 1.1)])
    assert not payoff.wants_short
    verdicts(payoff, [(5.0, 1.1)])
    assert payoff.wants_short, "a doubt is settled by short calls"
    losing = Payoff()
    verdicts(losing, [(1.0, 0.9)] * 4)
    assert not losing.is_on
    assert not losing.wants_short, "plain decoding has long calls"
