"""The jitted functions of the engine, beside those of decode/steps.py.

Row numbers and positions are values, not shapes: each function compiles once for each length class
(``read`` once for each size of chunk).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode import steps
from mixtral_jax.decode.controls import Mask, RowControls, best_width, likeliest, sample_controlled
from mixtral_jax.decode.sampling import Best, Column, RowSampling, Sampled
from mixtral_jax.decode.steps import DecodeState, Draft, Emitted, Limits
from mixtral_jax.kernels.attention import EMPTY
from mixtral_jax.kernels.rows import write_rows
from mixtral_jax.model.cache import SLOT_AXIS, KVCache
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.weights import choose_adapters

MOST_STEPS = 16  # steps that one call of ``step`` can take


class PoolState(NamedTuple):
    """The rows that are being answered.

    ``answered`` counts the tokens of each row's answer.
    """

    decode: DecodeState
    answered: Int[Array, "B V"]


class Block(NamedTuple):
    """Keys and values of a chunk of a row, ``[K, chunk, C]`` per layer (or codes and scales)."""

    keys: tuple[Any, ...]
    values: tuple[Any, ...]


class Written(NamedTuple):
    """What a call of ``step`` wrote, and the likeliest tokens ``[B, steps, n]`` beside it."""

    emitted: Emitted
    best: Best


@functools.partial(jax.jit, static_argnames=("config", "rows", "slots", "dtype", "placement"))
def empty_pool(
    config: ModelConfig, *, rows: int, slots: int, dtype: Any, placement: Placement
) -> PoolState:
    """A pool whose rows are all idle."""
    nothing, is_idle = jnp.zeros((rows,), jnp.int32), jnp.ones((rows,), bool)
    state = steps.empty_state(
        config, nothing, is_idle, slots=slots, dtype=dtype, placement=placement
    )
    return _placed(PoolState(state, jnp.zeros((rows, config.vocab_size), jnp.int32)), placement)


def _placed(pool: PoolState, placement: Placement) -> PoolState:
    answered = placement.constrain(pool.answered, ("batch", "vocab"))
    return PoolState(steps.constrained(pool.decode, placement), answered)


def _row_of(leaf: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, row, 0, keepdims=False)


def _with_row(leaf: jax.Array, value: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(leaf, value.astype(leaf.dtype), row, 0)


@functools.partial(jax.jit, static_argnames=("placement",), donate_argnames=("scratch",))
def restart(scratch: DecodeState, row: Int[Array, ""], *, placement: Placement) -> DecodeState:
    """Empties a row. Its keys and values become zero: a NaN left there would reach its queries."""

    def emptied(leaf: jax.Array, value: int = 0) -> jax.Array:
        return _with_row(leaf, jnp.full(leaf.shape[1:], value, leaf.dtype), row)

    cache = scratch.cache
    keys, values = jax.tree.map(emptied, (cache.keys, cache.values))
    state = scratch._replace(
        cache=KVCache(keys, values, emptied(cache.positions, EMPTY), emptied(cache.lengths)),
        seen=emptied(scratch.seen),
        expert_counts=emptied(scratch.expert_counts),
    )
    return steps.constrained(state, placement)


@functools.partial(jax.jit, static_argnames=("placement",), donate_argnames=("pool",))
def insert(
    pool: PoolState,
    scratch: DecodeState,
    from_row: Int[Array, ""],
    to_row: Int[Array, ""],
    token: Int[Array, ""],
    *,
    placement: Placement,
) -> PoolState:
    """Copies a prompt that was read into its slot, whose answer begins with the next step.

    Args:
        pool: donated.
        scratch: where the prompt was read, all but its last token. It has as many slots as the
            pool, or more, and then no row of this pool wraps around.
        from_row: of ``scratch``.
        to_row: of ``pool``; whatever was there is overwritten.
        token: the last token of the prompt.
        placement: where it runs.
    """

    def copied(into: jax.Array, source: jax.Array) -> jax.Array:
        """A row; of its slots those that a shorter pool has, which are the first."""
        row = _row_of(source, from_row)
        return _with_row(into, row[tuple(slice(size) for size in into.shape[1:])], to_row)

    old, new = pool.decode, scratch
    state = DecodeState(
        cache=jax.tree.map(copied, old.cache, new.cache),
        token=_with_row(old.token, token, to_row),
        seen=copied(old.seen, new.seen),
        step=_with_row(old.step, jnp.int32(0), to_row),
        is_done=_with_row(old.is_done, jnp.bool_(False), to_row),
        is_bad=_with_row(old.is_bad, jnp.bool_(False), to_row),
        dropped=old.dropped,
        expert_counts=copied(old.expert_counts, new.expert_counts),
    )
    answered = _with_row(pool.answered, jnp.zeros(pool.answered.shape[1:], jnp.int32), to_row)
    return _placed(PoolState(state, answered), placement)


@functools.partial(jax.jit, static_argnames=("size", "placement"))
def extract(
    scratch: DecodeState,
    row: Int[Array, ""],
    start: Int[Array, ""],
    *,
    size: int,
    placement: Placement,
) -> Block:
    """The keys and values at positions ``start`` and after of a row that has not wrapped."""

    def part(leaf: jax.Array) -> jax.Array:
        whole = _row_of(leaf, row)
        piece = jax.lax.dynamic_slice_in_dim(whole, start, size, SLOT_AXIS - 1)
        return placement.constrain(piece, ("kv_heads", "slots", "channels")[: piece.ndim])

    keys, values = jax.tree.map(part, (scratch.cache.keys, scratch.cache.values))
    return Block(keys, values)


@functools.partial(jax.jit, static_argnames=("placement",), donate_argnames=("scratch",))
def restore(
    scratch: DecodeState,
    block: Block,
    row: Int[Array, ""],
    start: Int[Array, ""],
    tokens: Int[Array, " chunk"],
    *,
    placement: Placement,
) -> DecodeState:
    """Puts a chunk that was kept behind the ``start`` tokens of a row, as if it had been read.

    The experts that it chose when it was read are not counted again.
    """
    cache, size = scratch.cache, tokens.shape[0]

    def put(leaf: jax.Array, piece: jax.Array) -> jax.Array:
        starts = [jnp.int32(0)] * leaf.ndim
        starts[0], starts[SLOT_AXIS] = row, start
        return jax.lax.dynamic_update_slice(leaf, piece[None], starts)

    keys, values = jax.tree.map(put, (cache.keys, cache.values), (block.keys, block.values))
    positions = start + jnp.arange(size, dtype=jnp.int32)
    positions = jax.lax.dynamic_update_slice(cache.positions, positions[None], (row, start))
    seen = _row_of(scratch.seen, row).at[tokens].set(True)
    state = scratch._replace(
        cache=KVCache(keys, values, positions, _with_row(cache.lengths, start + size, row)),
        seen=_with_row(scratch.seen, seen, row),
    )
    return steps.constrained(state, placement)


@functools.partial(jax.jit, static_argnames=("placement",), donate_argnames=("scratch",))
def read(
    model: Mixtral,
    scratch: DecodeState,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
    adapter_ids: Int[Array, " B"] | None,
    *,
    placement: Placement,
) -> DecodeState:
    """``prefill``, each row with its own adapter (None: the model has none)."""
    model = choose_adapters(model, adapter_ids)
    return steps.read(model, scratch, tokens, counts, placement=placement).state


class Scored(NamedTuple):
    """The scratch state, the log-probability of every target, f32, and the likeliest tokens.

    ``best`` ``[B, T, n]`` is nonsense unless it was asked for.
    """

    scratch: DecodeState
    logprobs: Float[Array, "B T"]
    best: Best


@functools.partial(jax.jit, static_argnames=("placement",), donate_argnames=("scratch",))
def score(
    model: Mixtral,
    scratch: DecodeState,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    counts: Int[Array, " B"],
    adapter_ids: Int[Array, " B"] | None,
    wants_best: Bool[Column, ""],
    *,
    placement: Placement,
) -> Scored:
    """``read`` that also says how likely the token after each was.

    Args:
        model: weights.
        scratch: donated.
        tokens: as for ``prefill``.
        targets: the token after each.
        counts: as for ``prefill``.
        adapter_ids: as for ``read``.
        wants_best: whether the likeliest tokens are wanted.
        placement: where it runs.
    """
    model = choose_adapters(model, adapter_ids)
    done = steps.read(model, scratch, tokens, counts, placement=placement)
    logits = model.unembed(done.x, placement)
    logits = placement.constrain(logits, ("batch", "length", "vocab_parts"))
    logits = placement.constrain(logits, ("batch", "length", "vocab"))
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    best = likeliest(logprobs, jnp.asarray(wants_best))
    of_targets = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    return Scored(done.state, of_targets, best)


@functools.partial(jax.jit, static_argnames=("placement",), donate_argnames=("pool",))
def step(
    model: Mixtral,
    pool: PoolState,
    rows: RowControls,
    mask: Mask,
    limits: Limits,
    num_steps: Int[Column, ""],
    adapter_ids: Int[Column, " B"] | None,
    *,
    placement: Placement,
) -> tuple[PoolState, Written]:
    """``decode_step`` with every option of a server: up to ``num_steps`` tokens for every row.

    Args:
        model: weights.
        pool: donated.
        rows: options.
        mask: what grammars allow at the next token: one step per call while any is on.
        limits: when rows end.
        num_steps: at most ``MOST_STEPS``.
        adapter_ids: as for ``read``.
        placement: where it runs.

    Returns:
        The pool and the tokens written.
    """
    B, V = pool.answered.shape
    model = choose_adapters(model, adapter_ids)
    decode = pool.decode
    pool = pool._replace(decode=decode._replace(is_done=decode.is_done | limits.stopped))
    no_draft = Draft(jnp.zeros((B, 0), jnp.int32), jnp.zeros((B,), jnp.int32))

    def body(carry: tuple[jax.Array, PoolState, Written]):
        i, pool, written = carry

        def choose(
            logits: jax.Array, seen: jax.Array, basic: RowSampling, step: jax.Array
        ) -> tuple[Sampled, Best]:
            now = rows._replace(sampling=basic)
            return sample_controlled(logits, seen, pool.answered, now, mask, step)

        state, wrote = steps.write_tokens(
            model, pool.decode, no_draft, rows.sampling, limits, placement=placement, choose=choose
        )
        assert wrote.best is not None
        emitted, counts = wrote.emitted, written.emitted.counts
        places = jnp.where(emitted.counts > 0, counts, MOST_STEPS)[:, None]
        best = Best(
            *(write_rows(a, b, places) for a, b in zip(written.best, wrote.best, strict=True))
        )
        answered = pool.answered.at[jnp.arange(B), emitted.tokens[:, 0]].add(emitted.counts)
        pool = _placed(PoolState(state, answered), placement)
        return i + 1, pool, Written(steps.append(written.emitted, emitted), best)

    def goes_on(carry: tuple[jax.Array, PoolState, Written]) -> jax.Array:
        i, pool, _ = carry
        return (i < num_steps) & (i < MOST_STEPS) & ~pool.decode.is_done.all()

    shape = (B, MOST_STEPS, best_width(V))
    best = Best(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    start = jnp.int32(0), pool, Written(steps.no_tokens(B, MOST_STEPS), best)
    _, pool, written = jax.lax.while_loop(goes_on, body, start)
    return pool, written
