"""The two jitted functions of generation: prefill reads prompts, decode_step writes tokens.

Both take the state as a donated argument and give it back, so the cache is updated in place. Their
shapes depend on buckets of rows and lengths only, never on a prompt or on routing.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode.sampling import Column, RowSampling, sample
from mixtral_jax.model.cache import KVCache, init_cache
from mixtral_jax.model.placement import Placement, Routing, constrain_kv
from mixtral_jax.model.transformer import Mixtral

STEPS_PER_CALL = 32  # tokens that one call of decode_step can write


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
    """What a call of decode_step wrote: row b has ``counts[b]`` tokens, the rest is padding."""

    tokens: Int[Array, "B steps"]
    logprobs: Float[Array, "B steps"]
    counts: Int[Array, " B"]


def _constrained(state: DecodeState, placement: Placement) -> DecodeState:
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


def _count(counts: Int[Array, "B L E"], routing: tuple[Routing, ...]) -> Int[Array, "B L E"]:
    """Adds what every layer's router chose. By row, so that no device needs another's numbers."""
    B, _, E = counts.shape
    chosen = [
        (jax.nn.one_hot(layer.expert_ids, E, dtype=jnp.int32) * layer.valid[:, None, None])
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
    return _constrained(state, placement)


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
    # Else the compiler places what comes from the host, and everything made of it, as it likes.
    tokens = placement.constrain(tokens, ("batch", "length"))
    valid = jnp.arange(tokens.shape[1])[None, :] < placement.constrain(counts, ("batch",))[:, None]
    hidden = model.hidden(tokens, valid, cache=state.cache, placement=placement)
    assert hidden.cache is not None
    state = state._replace(
        cache=hidden.cache,
        seen=_mark(state.seen, tokens, valid),
        dropped=state.dropped + hidden.dropped,
        expert_counts=_count(state.expert_counts, hidden.routing),
    )
    return _constrained(state, placement)


def _mark(
    seen: Bool[Array, "B V"], tokens: Int[Array, "B T"], valid: Bool[Array, "B T"]
) -> Bool[Array, "B V"]:
    past_the_end = jnp.where(valid, tokens, seen.shape[-1])
    return jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(seen, past_the_end)


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
    emitted = Emitted(
        tokens=jnp.zeros((B, STEPS_PER_CALL), jnp.int32),
        logprobs=jnp.zeros((B, STEPS_PER_CALL), jnp.float32),
        counts=jnp.zeros((B,), jnp.int32),
    )

    def body(carry: tuple[jax.Array, DecodeState, Emitted]):
        i, state, emitted = carry
        token, goes_on = state.token[:, None], ~state.is_done[:, None]
        hidden = model.hidden(token, goes_on, cache=state.cache, placement=placement)
        assert hidden.cache is not None
        seen = _mark(state.seen, token, goes_on)
        logits = model.unembed(hidden.x[:, 0], placement)
        # Split as the head is, then whole rows: one collective of logits, not one of the head, nor
        # the dozen that sorting a split row would take.
        logits = placement.constrain(logits, ("batch", "vocab_parts"))
        logits = placement.constrain(logits, ("batch", "vocab"))
        sampled = sample(logits, seen, rows, state.step)
        writes = ~state.is_done & ~sampled.is_bad
        emitted = Emitted(
            tokens=emitted.tokens.at[:, i].set(jnp.where(writes, sampled.tokens, 0)),
            logprobs=emitted.logprobs.at[:, i].set(jnp.where(writes, sampled.logprobs, 0.0)),
            counts=emitted.counts + writes,
        )
        step = state.step + writes
        at_end = (sampled.tokens[:, None] == limits.eos_ids[None, :]).any(axis=-1)
        ends = (at_end & ~rows.ignore_eos) | (step >= limits.budget)
        state = DecodeState(
            cache=hidden.cache,
            token=jnp.where(writes, sampled.tokens, state.token),
            seen=seen,
            step=step,
            is_done=state.is_done | sampled.is_bad | ends,
            is_bad=state.is_bad | (sampled.is_bad & ~state.is_done),
            dropped=state.dropped + hidden.dropped,
            expert_counts=_count(state.expert_counts, hidden.routing),
        )
        return i + 1, _constrained(state, placement), emitted

    def goes_on(carry: tuple[jax.Array, DecodeState, Emitted]) -> jax.Array:
        i, state, _ = carry
        return (i < num_steps) & (i < STEPS_PER_CALL) & ~state.is_done.all()

    _, state, emitted = jax.lax.while_loop(goes_on, body, (jnp.int32(0), state, emitted))
    return state, emitted
