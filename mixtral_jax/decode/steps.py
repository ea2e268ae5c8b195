"""The two jitted functions of generation: prefill reads prompts, decode_step writes tokens.

Both take the state as a donated argument and give it back, so the cache is updated in place. Shapes
depend on buckets of rows and lengths only, never on a prompt or on routing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode.sampling import Best, Chooser, Column, RowSampling, choose_alone
from mixtral_jax.kernels.rows import write_rows
from mixtral_jax.model.cache import KVCache, init_cache, rewind
from mixtral_jax.model.placement import Placement, Routing, constrain_kv
from mixtral_jax.model.transformer import Hidden, Mixtral

STEPS_PER_CALL = 32  # steps that one call of decode_step can take


class DecodeState(NamedTuple):
    """Everything that changes while rows are generated.

    Attributes:
        cache: keys and values of every token but the last.
        token: each row's last token, which the next step reads first.
        seen: tokens of the prompt and of the answer so far.
        step: tokens generated.
        is_done: rows that write no more (finished, stopped, or padding of the batch).
        is_bad: rows that ended because their logits were NaN.
        dropped: expert assignments left out so far, per layer.
        expert_counts: how often each row's tokens chose each expert of each layer.
    """

    cache: KVCache
    token: Int[Array, " B"]
    seen: Bool[Array, "B V"]
    step: Int[Array, " B"]
    is_done: Bool[Array, " B"]
    is_bad: Bool[Array, " B"]
    dropped: Int[Array, " L"]
    expert_counts: Int[Array, "B L E"]


class Limits(NamedTuple):
    """When rows end: after ``budget`` tokens, at one of ``eos_ids``, or where ``stopped``."""

    budget: Int[Column, " B"]
    stopped: Bool[Column, " B"]
    eos_ids: Int[Column, " eos"]


class Emitted(NamedTuple):
    """What was written: row b has ``counts[b]`` tokens, the rest is padding."""

    tokens: Int[Array, "B steps"]
    logprobs: Float[Array, "B steps"]
    counts: Int[Array, " B"]


class Draft(NamedTuple):
    """Tokens guessed to follow each row's last: row b has ``counts[b]``, the rest is padding."""

    tokens: Int[Array, "B K"]
    counts: Int[Array, " B"]


def nothing_drafted(rows: int) -> Draft:
    """The draft of plain decoding."""
    return Draft(jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows,), jnp.int32))


def constrained(state: DecodeState, placement: Placement) -> DecodeState:
    """The state where the placement wants it; without this a second call might compile again."""
    row = ("batch",)
    kv = [tuple(constrain_kv(x, placement) for x in side) for side in state.cache[:2]]
    positions = placement.constrain(state.cache.positions, ("batch", "slots"))
    return DecodeState(
        KVCache(kv[0], kv[1], positions, placement.constrain(state.cache.lengths, row)),
        placement.constrain(state.token, row),
        placement.constrain(state.seen, ("batch", "vocab")),
        placement.constrain(state.step, row),
        placement.constrain(state.is_done, row),
        placement.constrain(state.is_bad, row),
        placement.constrain(state.dropped, ("layers",)),
        placement.constrain(state.expert_counts, ("batch", "layers", "router_expert")),
    )


def _count(
    counts: Int[Array, "B L E"], routing: tuple[Routing, ...], kept: Bool[Array, "B T"]
) -> Int[Array, "B L E"]:
    """Adds what every layer's router chose for the tokens that are kept.

    By row, so that no device needs another's numbers.
    """
    B, _, E = counts.shape
    chosen = [
        (jax.nn.one_hot(layer.expert_ids, E, dtype=jnp.int32) * kept.reshape(-1, 1, 1))
        .reshape(B, -1, E)
        .sum(axis=1)
        for layer in routing
    ]
    return counts + jnp.stack(chosen, axis=1)


@functools.partial(jax.jit, static_argnames=("config", "slots", "dtype", "placement"))
def empty_state(
    config: ModelConfig,
    last_tokens: Int[Array, " B"],
    is_padding: Bool[Array, " B"],
    *,
    slots: int,
    dtype: Any,
    placement: Placement,
) -> DecodeState:
    """A state before any token was read, born on its devices.

    Args:
        config: sizes.
        last_tokens: the last token of each prompt; prefill reads those before it.
        is_padding: rows that only fill the batch.
        slots: of the cache, see ``model/cache.py``.
        dtype: of keys and values, see ``init_cache``.
        placement: where it runs.
    """
    B = last_tokens.shape[0]
    state = DecodeState(
        cache=init_cache(config, rows=B, slots=slots, dtype=dtype),
        token=last_tokens,
        seen=jnp.zeros((B, config.vocab_size), bool),
        step=jnp.zeros((B,), jnp.int32),
        is_done=is_padding,
        is_bad=jnp.zeros((B,), bool),
        dropped=jnp.zeros((config.num_hidden_layers,), jnp.int32),
        expert_counts=jnp.zeros((B, config.num_hidden_layers, config.num_local_experts), jnp.int32),
    )
    return constrained(state, placement)


@functools.partial(jax.jit, static_argnames=("placement",), donate_argnames=("state",))
def prefill(
    model: Mixtral,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
    *,
    placement: Placement,
) -> DecodeState:
    """Reads the next chunk of every row's prompt, up to but not including its last token.

    Args:
        model: weights.
        state: donated.
        tokens: the chunk; row b holds ``counts[b]`` tokens, then padding.
        counts: 0 for rows whose prompt has ended (or is padding of the batch).
        placement: where it runs.

    Returns:
        The state with the chunk in its cache. The first decode_step reads the last token of each
        prompt, so no logits are computed here.
    """
    return read(model, state, tokens, counts, placement=placement).state


class Read(NamedTuple):
    """The state after tokens were read, and their residual stream ``[B, T, D]``."""

    state: DecodeState
    x: Float[Array, "B T D"]


def read(
    model: Mixtral,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
    *,
    placement: Placement,
) -> Read:
    """What ``prefill`` does, for other programs to be made of."""
    # Else the compiler places what comes from the host, and everything made of it, as it likes.
    tokens = placement.constrain(tokens, ("batch", "length"))
    valid = jnp.arange(tokens.shape[1])[None, :] < placement.constrain(counts, ("batch",))[:, None]
    hidden = model.hidden(tokens, valid, cache=state.cache, placement=placement)
    return Read(has_read(state, hidden, tokens, valid, placement), hidden.x)


def has_read(
    state: DecodeState,
    hidden: Hidden,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    placement: Placement,
) -> DecodeState:
    """The state after tokens of prompts went through the model."""
    assert hidden.cache is not None
    read = state._replace(
        cache=hidden.cache,
        seen=mark(state.seen, tokens, valid),
        dropped=state.dropped + hidden.dropped,
        expert_counts=_count(state.expert_counts, hidden.routing, valid),
    )
    return constrained(read, placement)


def mark(
    seen: Bool[Array, "B V"], tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> Bool[Array, "B V"]:
    """``seen`` with every row's valid tokens."""
    past_the_end = jnp.where(valid, tokens, seen.shape[-1])
    return jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(seen, past_the_end)


def no_tokens(rows: int, size: int) -> Emitted:
    """Room for ``size`` tokens per row, none written."""
    tokens, counts = jnp.zeros((rows, size), jnp.int32), jnp.zeros((rows,), jnp.int32)
    return Emitted(tokens, jnp.zeros((rows, size), jnp.float32), counts)


def append(emitted: Emitted, new: Emitted) -> Emitted:
    """Tokens after those already there."""
    size, place = emitted.tokens.shape[1], jnp.arange(new.tokens.shape[1])
    slots = jnp.where(place < new.counts[:, None], emitted.counts[:, None] + place, size)
    return Emitted(
        tokens=write_rows(emitted.tokens, new.tokens, slots),
        logprobs=write_rows(emitted.logprobs, new.logprobs, slots),
        counts=emitted.counts + new.counts,
    )


class Wrote(NamedTuple):
    """What one step wrote.

    ``is_refused`` marks rows that wrote nothing because their logits were NaN beside a draft: NaN
    reaches the tokens before it through masked products, so the draft may have brought it. The
    caller gives them no draft from then on, and what is the row's own will show. ``best`` is what
    the chooser gave, ``[B, K + 1, n]``.
    """

    emitted: Emitted
    is_refused: Bool[Array, " B"]
    best: Best | None = None


def write_tokens(
    model: Mixtral,
    state: DecodeState,
    draft: Draft,
    rows: RowSampling,
    limits: Limits,
    *,
    placement: Placement,
    choose: Chooser = choose_alone,
) -> tuple[DecodeState, Wrote]:
    """Writes one token to every row that is not done, and one more for each drafted token met.

    Reads the last token and the draft behind it in one pass. Every position is sampled with the
    random numbers of its own step, and counts only while the draft was what had been sampled, so
    the tokens are those of one step after another, whatever the draft (Leviathan et al. 2023 accept
    with some probability instead; the draft here has none). What was read in vain is taken back.

    Args:
        model: weights.
        state: any. Of a row that goes on, the draft ends before its budget.
        draft: with K = 0 this is plain decoding.
        rows: sampling options.
        limits: when rows end.
        placement: where it runs.
        choose: the sampler.

    Returns:
        The state, and at most K + 1 tokens per row.
    """
    tokens, valid = next_tokens(state, draft)
    hidden = model.hidden(tokens, valid, cache=state.cache, placement=placement)
    logits = model.unembed(hidden.x, placement)
    return has_written(state, hidden, logits, draft, rows, limits, placement, choose)


def next_tokens(state: DecodeState, draft: Draft) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """What a step reads: each row's last token and its draft, and which of them are real."""
    tokens = jnp.concatenate([state.token[:, None], draft.tokens], axis=1)
    place = jnp.arange(tokens.shape[1])
    return tokens, ~state.is_done[:, None] & (place <= draft.counts[:, None])


def has_written(
    state: DecodeState,
    hidden: Hidden,
    logits: Float[Array, "B T V"],
    draft: Draft,
    rows: RowSampling,
    limits: Limits,
    placement: Placement,
    choose: Chooser = choose_alone,
) -> tuple[DecodeState, Wrote]:
    """The second half of ``write_tokens``: samples, and keeps what counts."""
    assert hidden.cache is not None
    tokens, valid = next_tokens(state, draft)
    goes_on, place = ~state.is_done[:, None], jnp.arange(tokens.shape[1])
    # Split as the head is, then whole rows: one collective of logits, not one of the head, nor
    # the dozen that sorting a split row would take.
    logits = placement.constrain(logits, ("batch", "length", "vocab_parts"))
    logits = placement.constrain(logits, ("batch", "length", "vocab"))
    seen = [mark(state.seen, tokens[:, :n], valid[:, :n]) for n in range(1, tokens.shape[1] + 1)]
    step = state.step[:, None] + place
    each = jax.vmap(choose, in_axes=(1, 1, None, 1), out_axes=1)
    sampled, best = each(logits, jnp.stack(seen, axis=1), rows, step)

    at_end = (sampled.tokens[..., None] == limits.eos_ids).any(axis=-1)
    ends = at_end & ~rows.ignore_eos[:, None]
    ends |= sampled.is_bad | (step + 1 >= limits.budget[:, None])
    is_met = valid[:, 1:] & (draft.tokens == sampled.tokens[:, :-1]) & ~ends[:, :-1]
    # A position counts if every one before it went on to it.
    counts_at = jnp.cumprod(jnp.concatenate([goes_on, is_met], axis=1), axis=1).astype(bool)
    is_bad = (counts_at & sampled.is_bad).any(axis=1)
    is_refused = is_bad & (draft.counts > 0)
    counts_at &= ~is_refused[:, None]
    is_bad &= ~is_refused
    kept = counts_at.sum(axis=1, dtype=jnp.int32)  # tokens read that stay in the cache
    counts = kept - is_bad
    last = jnp.take_along_axis(sampled.tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
    cache = hidden.cache
    if draft.tokens.shape[1]:
        cache = rewind(cache, state.cache.lengths + kept, draft.tokens.shape[1] + 1)
    state = DecodeState(
        cache=cache,
        token=jnp.where(counts > 0, last, state.token),
        seen=mark(state.seen, tokens, counts_at),
        step=state.step + counts,
        is_done=state.is_done | (counts_at & ends).any(axis=1),
        is_bad=state.is_bad | is_bad,
        dropped=state.dropped + hidden.dropped,
        expert_counts=_count(state.expert_counts, hidden.routing, counts_at),
    )
    emitted = Emitted(sampled.tokens, sampled.logprobs, counts)
    return constrained(state, placement), Wrote(emitted, is_refused, best)


@functools.partial(jax.jit, static_argnames=("placement",), donate_argnames=("state",))
def decode_step(
    model: Mixtral,
    state: DecodeState,
    rows: RowSampling,
    limits: Limits,
    num_steps: Int[Array, ""],
    *,
    placement: Placement,
) -> tuple[DecodeState, Emitted]:
    """Writes up to ``num_steps`` tokens (at most ``STEPS_PER_CALL``) to every row that is not done.

    One loop inside one program: sampling and the checks for the end run on the device, and the loop
    ends early when every row is done.

    Args:
        model: weights.
        state: donated.
        rows: sampling options.
        limits: when rows end.
        num_steps: a number, not a shape: other values do not compile again.
        placement: where it runs.

    Returns:
        The state and the tokens written.
    """
    B = state.step.shape[0]
    state = state._replace(is_done=state.is_done | limits.stopped)

    def body(carry: tuple[jax.Array, DecodeState, Emitted]):
        i, state, emitted = carry
        drafted = nothing_drafted(B)
        state, wrote = write_tokens(model, state, drafted, rows, limits, placement=placement)
        return i + 1, state, append(emitted, wrote.emitted)

    def goes_on(carry: tuple[jax.Array, DecodeState, Emitted]) -> jax.Array:
        i, state, _ = carry
        return (i < num_steps) & (i < STEPS_PER_CALL) & ~state.is_done.all()

    start = jnp.int32(0), state, no_tokens(B, STEPS_PER_CALL)
    _, state, emitted = jax.lax.while_loop(goes_on, body, start)
    return state, emitted
