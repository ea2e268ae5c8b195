"""Speculation by prompt lookup: what followed the last words before is drafted to follow again.

A draft is the continuation of the most recent earlier occurrence of a row's last n-gram in its own
prompt and answer (Saxena 2023, "prompt lookup decoding"; TGI's ``--speculate``). One pass reads it
behind the row's last token and keeps what sampling would have written anyway (``write_tokens``), so
speculation changes how fast tokens come and not which.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mixtral_jax.decode.sampling import RowSampling
from mixtral_jax.decode.steps import (
    STEPS_PER_CALL,
    DecodeState,
    Draft,
    Emitted,
    Limits,
    Wrote,
    append,
    no_tokens,
    write_tokens,
)
from mixtral_jax.kernels.rows import write_rows
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.sharding import hosts

LONGEST_NGRAM = 3  # looked for first
SHORTEST_NGRAM = 2  # looked for where there is no longer one

# Steps of the calls that drafting is judged by, with and without drafts.
TRIAL_STEPS = 8
# It is off after so many verdicts against it in a row.
LOSSES = 2
# A verdict against it needs this many times the seconds of plain steps: clocks are noisy.
MARGIN = 1.05


class Memory(NamedTuple):
    """What drafts are made from: donated beside the state and given back.

    Attributes:
        history: each row's tokens, prompt and answer, at their absolute positions.
        may_draft: false for rows whose logits were NaN beside a draft.
    """

    history: Int[Array, "B N"]
    may_draft: Bool[Array, " B"]


class Tally(NamedTuple):
    """What a call did, over all rows.

    Attributes:
        steps: passes of the batch.
        row_steps: passes of a row that wrote tokens; without drafts each writes one.
        drafted: tokens drafted.
        accepted: of these, the ones that were written.
    """

    steps: Int[Array, ""]
    row_steps: Int[Array, ""]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("placement",))
def remember(history: Int[Array, "B N"], *, placement: Placement) -> Memory:
    """The memory of rows that have not been decoded yet, born on its devices."""
    return _constrained(Memory(history, jnp.ones(history.shape[:1], bool)), placement)


def _constrained(memory: Memory, placement: Placement) -> Memory:
    """As in ``steps``: without this a second call might compile again."""
    history = placement.constrain(memory.history, ("batch", "length"))
    return Memory(history, placement.constrain(memory.may_draft, ("batch",)))


def _extended(memory: Memory, lengths: Int[Array, " B"], wrote: Wrote) -> Memory:
    """The memory of rows that had so many tokens, with what a step wrote."""
    new, past_the_end = wrote.emitted, memory.history.shape[1]
    place = jnp.arange(new.tokens.shape[1])
    slots = jnp.where(place < new.counts[:, None], lengths[:, None] + place, past_the_end)
    history = write_rows(memory.history, new.tokens, slots)
    return Memory(history, memory.may_draft & ~wrote.is_refused)


def _counted(tally: Tally, draft: Draft, new: Emitted) -> Tally:
    """The tally with one more step."""
    writes = (new.counts > 0).sum(dtype=jnp.int32)
    return Tally(
        steps=tally.steps + 1,
        row_steps=tally.row_steps + writes,
        drafted=tally.drafted + draft.counts.sum(dtype=jnp.int32),
        accepted=tally.accepted + new.counts.sum(dtype=jnp.int32) - writes,
    )


class _Carry(NamedTuple):
    state: DecodeState
    memory: Memory
    draft: Draft
    emitted: Emitted
    tally: Tally


def find_draft(
    history: Int[Array, "B N"],
    lengths: Int[Array, " B"],
    most: Int[Array, " B"],
    *,
    num_drafts: int,
) -> Draft:
    """What followed the last n-gram of each row where it stood before.

    The longest n-gram wins, and of several places the last. A continuation that runs into the end
    of the row goes on from its own beginning, so that a short cycle fills a whole draft.

    Args:
        history: tokens at their absolute positions.
        lengths: tokens of each row.
        most: tokens that a row's draft may have.
        num_drafts: K; no draft has more.

    Returns:
        Drafts; rows whose last n-gram is new have none.
    """
    N = history.shape[1]
    place = jnp.arange(N)
    end = lengths[:, None] - 1

    def before(n: int) -> jax.Array:
        """Which tokens equal the row's n-th last, seen from the end of their n-gram."""
        last = jnp.take_along_axis(history, jnp.maximum(end - n, 0), axis=1)
        return jnp.roll(history == last, n, axis=1) & (place >= n)

    # The length of the n-gram that ends at each place and equals the row's last.
    is_same = jnp.broadcast_to(place < end, history.shape)
    longest = jnp.zeros(history.shape, jnp.int32)
    for n in range(LONGEST_NGRAM):
        is_same &= before(n)
        longest += is_same
    rank = jnp.where(longest >= SHORTEST_NGRAM, longest * N + place, -1)
    found = jnp.argmax(rank, axis=1)[:, None]
    ahead = found + 1 + jnp.arange(num_drafts) % jnp.maximum(end - found, 1)
    tokens = jnp.take_along_axis(history, ahead, axis=1, mode="clip")
    is_found = rank.max(axis=1) >= 0
    return Draft(tokens, jnp.where(is_found, jnp.clip(most, 0, num_drafts), 0))


@functools.partial(
    jax.jit,
    static_argnames=("num_drafts", "placement"),
    donate_argnames=("state", "memory"),
)
def speculate_step(
    model: Mixtral,
    state: DecodeState,
    memory: Memory,
    rows: RowSampling,
    limits: Limits,
    num_steps: Int[Array, ""],
    is_on: Bool[Array, ""],
    *,
    num_drafts: int,
    placement: Placement,
) -> tuple[DecodeState, Memory, Emitted, Tally]:
    """``decode_step`` with drafts: each step writes up to ``num_drafts`` + 1 tokens to a row.

    A step in which no row has a draft is a plain one, and so is every step while ``is_on`` is
    false: switching off compiles nothing and converts nothing.

    Args:
        model: weights.
        state: donated. Its ring has at least W + ``num_drafts`` slots.
        memory: donated.
        rows: sampling options.
        limits: when rows end.
        num_steps: a number, not a shape; at most ``STEPS_PER_CALL``.
        is_on: whether to draft.
        num_drafts: K, the longest draft.
        placement: where it runs.

    Returns:
        State and memory, the tokens written and what it took.
    """
    B, K = state.step.shape[0], num_drafts

    def draft_of(state: DecodeState, memory: Memory) -> Draft:
        # A step writes one token more than it accepts: no token lies past the budget, nor any
        # drafted key past the slots.
        most = limits.budget - state.step - 1
        most = jnp.where(memory.may_draft & ~state.is_done & is_on, most, 0)
        return find_draft(memory.history, state.cache.lengths + 1, most, num_drafts=K)

    def step(carry: _Carry, *, longest: int) -> _Carry:
        """One step; longest is K, or 0 where no row has a draft."""
        state, memory, draft, emitted, tally = carry
        lengths = state.cache.lengths + 1  # the last token is not in the cache yet
        draft = Draft(draft.tokens[:, :longest], draft.counts)
        state, wrote = write_tokens(model, state, draft, rows, limits, placement=placement)
        memory = _constrained(_extended(memory, lengths, wrote), placement)
        new = wrote.emitted
        tally = _counted(tally, draft, new)
        return _Carry(state, memory, draft_of(state, memory), append(emitted, new), tally)

    def goes_on(carry: _Carry) -> jax.Array:
        i = carry.tally.steps
        return (i < num_steps) & (i < STEPS_PER_CALL) & ~carry.state.is_done.all()

    def has_draft(carry: _Carry) -> jax.Array:
        return (carry.draft.counts > 0).any()

    def body(carry: _Carry) -> _Carry:
        # Loops that take turns: a conditional would copy the cache in every step.
        carry = jax.lax.while_loop(
            lambda carry: goes_on(carry) & ~has_draft(carry),
            functools.partial(step, longest=0),
            carry,
        )
        return jax.lax.while_loop(
            lambda carry: goes_on(carry) & has_draft(carry),
            functools.partial(step, longest=K),
            carry,
        )

    state, zero = state._replace(is_done=state.is_done | limits.stopped), jnp.int32(0)
    emitted = no_tokens(B, STEPS_PER_CALL * (K + 1))
    start = _Carry(state, memory, draft_of(state, memory), emitted, Tally(zero, zero, zero, zero))
    end = jax.lax.while_loop(goes_on, body, start)
    return end.state, end.memory, end.emitted, end.tally


class Payoff:
    """Decides, call by call, whether speculation is worth its wider steps: by the clock.

    What is compared is seconds per token of a row, so that rows which have ended do not matter. The
    call after the first with a draft is a trial without. A call with drafts that was slower than
    the last trial by ``MARGIN`` is confirmed by another pair of calls; a second verdict of that
    kind, with none to the contrary between, switches off for good. A call in which nothing was
    drafted says nothing: the text may begin to repeat later. Until a verdict in favour calls are
    short, so that few steps are lost where drafts do not pay.

    Attributes:
        is_on: false once it was switched off.
    """

    def __init__(self):
        self.is_on = True
        self._losses = 0
        self._has_won = False  # the last verdict
        self._drafted: float | None = None  # seconds per token of the last call with drafts
        self._plain: float | None = None  # and of the last without; None where one is wanted

    @property
    def wants_trial(self) -> bool:
        """Whether the next call should be a plain one."""
        return self.is_on and self._drafted is not None and self._plain is None

    @property
    def wants_short(self) -> bool:
        """Whether the next call should have ``TRIAL_STEPS``."""
        return self.wants_trial or (self.is_on and not self._has_won)

    def add(self, seconds: float, *, steps: int, row_steps: int, drafted: int, tokens: int) -> None:
        """Takes what the last call took, compilation apart, and what it did (see Tally)."""
        if not self.is_on or tokens == 0 or (drafted == 0 and not self.wants_trial):
            return
        per_token = seconds / steps * row_steps / tokens
        if self.wants_trial:
            self._plain = per_token
        else:
            self._drafted = per_token
        if self._drafted is None or self._plain is None:
            return
        self._has_won = self._drafted <= MARGIN * self._plain  # a tie is no reason to end either
        if self._has_won:
            self._losses = 0
        else:
            self._losses += 1
            self.is_on = self._losses < LOSSES
            self._drafted = self._plain = None


@dataclasses.dataclass(kw_only=True)
class Speculated:
    """What speculation did for a batch so far.

    Attributes:
        drafted: tokens drafted.
        accepted: of these, the ones that were written.
        row_steps: passes of a row that wrote tokens, those without drafts too.
        switched_off: whether it was not worth its cost.
    """

    drafted: int = 0
    accepted: int = 0
    row_steps: int = 0
    switched_off: bool = False


class Speculator:
    """Speculation on the host: takes the place of ``decode_step`` for one batch.

    Args:
        prompts: token ids of each row.
        rows: of the batch, padding included.
        size: at least the tokens of the longest row, prompt and answer.
        num_drafts: K.
        placement: where it runs.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        rows: int,
        size: int,
        num_drafts: int,
        placement: Placement,
    ):
        self.report = Speculated()
        history = np.zeros((rows, size), np.int32)
        for row, ids in enumerate(prompts):
            history[row, : len(ids)] = ids
        hosts.begin_step()
        self._memory = remember(history, placement=placement)
        self._num_drafts, self._placement = num_drafts, placement
        self._payoff = Payoff()
        self._tally: Tally | None = None

    def step(
        self,
        model: Mixtral,
        state: DecodeState,
        rows: RowSampling,
        limits: Limits,
        num_steps: int,
    ) -> tuple[DecodeState, Emitted]:
        """The next call; ``learn`` is to follow before another."""
        is_trial, is_short = self._payoff.wants_trial, self._payoff.wants_short
        hosts.begin_step()
        state, self._memory, emitted, self._tally = speculate_step(
            model,
            state,
            self._memory,
            rows,
            limits,
            np.int32(min(num_steps, TRIAL_STEPS) if is_short else num_steps),
            np.bool_(self._payoff.is_on and not is_trial),
            num_drafts=self._num_drafts,
            placement=self._placement,
        )
        return state, emitted

    def learn(self, seconds: float, tokens: int) -> None:
        """What the last call took, compilation apart, and the tokens that it wrote."""
        assert self._tally is not None
        steps, row_steps, drafted, accepted = map(int, hosts.fetch(self._tally))
        # Every process must come to one verdict, or their programs would part.
        seconds = hosts.of_first(seconds)
        self._payoff.add(seconds, steps=steps, row_steps=row_steps, drafted=drafted, tokens=tokens)
        report = self.report
        report.drafted += drafted
        report.accepted += accepted
        report.row_steps += row_steps
        report.switched_off = not self._payoff.is_on
