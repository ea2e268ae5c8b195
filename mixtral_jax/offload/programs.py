"""The programs between which the host looks at the routing: compiled once for all layers alike.

``begin_*`` looks tokens up, ``attend`` is a layer up to its router, ``visit`` one expert, ``end_*``
what comes after the layers. Between two of them the residual stream ``x [B, T, D]`` and the sum of
the experts' shares ``shares [N, D]`` (f32) are handed on; ``attend`` and ``end_*`` add the latter.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.decode import steps
from mixtral_jax.decode.sampling import RowSampling
from mixtral_jax.decode.steps import DecodeState, Emitted, Limits
from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.model.attention import LayerKV
from mixtral_jax.model.moe import Router
from mixtral_jax.model.norm import RMSNorm
from mixtral_jax.model.placement import LocalPlacement, Routing
from mixtral_jax.model.router import route
from mixtral_jax.model.transformer import Block, Hidden, Mixtral, Start
from mixtral_jax.weights import ExpertSlots, takes_slots

_jit = functools.partial(jax.jit, static_argnames=("placement",))


class Begun(NamedTuple):
    """What the first layer starts from; no shares yet."""

    start: Start
    shares: Float[Array, "N D"]


class Ahead(NamedTuple):
    """What tells a layer's experts: its norm and router."""

    norm: RMSNorm
    router: Router


class Attended(NamedTuple):
    """A layer up to its experts.

    ``counts[0]`` are the rows of each expert, ``counts[1]`` those that the next layer's router
    gives its experts if it reads this layer's residual stream: a guess (Eliseev & Mazur 2023,
    arXiv 2312.17238).
    """

    x: Float[Array, "B T D"]
    shares: Float[Array, "N D"]
    cache: LayerKV | None
    rows: Float[Array, "N D"]
    routing: Routing
    counts: Int[Array, "2 E"]


def _begun(start: Start) -> Begun:
    return Begun(start, jnp.zeros((start.valid.size, start.x.shape[-1]), jnp.float32))


@_jit
def begin_prefill(
    ends: Mixtral,
    state: DecodeState,
    tokens: Int[Array, "B T"],
    counts: Int[Array, " B"],
    *,
    placement: LocalPlacement,
) -> Begun:
    """A chunk of prompts; ``state`` without keys and values."""
    valid = jnp.arange(tokens.shape[1])[None, :] < counts[:, None]
    return _begun(ends.begin(tokens, valid, cache=state.cache, placement=placement))


@_jit
def begin_step(
    ends: Mixtral, state: DecodeState, stopped: Bool[Array, " B"], *, placement: LocalPlacement
) -> Begun:
    """The last token of every row that goes on; ``state`` without keys and values."""
    state = state._replace(is_done=state.is_done | stopped)
    tokens, valid = steps.next_tokens(state, steps.nothing_drafted(stopped.shape[0]))
    return _begun(ends.begin(tokens, valid, cache=state.cache, placement=placement))


@_jit
def begin_score(
    ends: Mixtral,
    tokens: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    *,
    placement: LocalPlacement,
) -> Begun:
    """Whole rows, without a cache."""
    return _begun(ends.begin(tokens, valid, cache=None, placement=placement))


def _rows_of(routing: Routing, num_experts: int) -> Int[Array, " E"]:
    chosen = jax.nn.one_hot(routing.expert_ids, num_experts, dtype=jnp.int32)
    return (chosen * routing.valid[:, None, None]).sum(axis=(0, 1))


def _add(x: Float[Array, "B T D"], shares: Float[Array, "N D"]) -> Float[Array, "B T D"]:
    return x + shares.astype(x.dtype).reshape(x.shape)


@functools.partial(_jit, donate_argnames=("x", "shares", "cache"))
def attend(
    block: Block,
    ahead: Ahead,
    x: Float[Array, "B T D"],
    shares: Float[Array, "N D"],
    cache: LayerKV | None,
    start: Start,
    *,
    placement: LocalPlacement,
) -> Attended:
    """Adds the shares of the layer before, attends, and asks the router; and the next one."""
    x, cache = block.attend(_add(x, shares), start, cache, placement)
    choice = block.moe.choose(block.moe_norm(x), start.valid, placement)
    rows = ahead.norm(x).reshape(choice.rows.shape)
    logits = ahead.router(rows, placement)
    guess = route(logits, choice.routing.valid, top_k=ahead.router.top_k)
    counts = jnp.stack([_rows_of(each, logits.shape[1]) for each in (choice.routing, guess)])
    return Attended(x, jnp.zeros_like(shares), cache, choice.rows, choice.routing, counts)


@functools.partial(
    jax.jit, static_argnames=("placement", "num_experts"), donate_argnames=("shares",)
)
def visit(
    shares: Float[Array, "N D"],
    rows: Float[Array, "N D"],
    routing: Routing,
    expert: ExpertWeights,
    expert_id: Int[Array, ""],
    *,
    placement: LocalPlacement,
    num_experts: int,
) -> tuple[Float[Array, "N D"], Float[Array, ""]]:
    """Adds one expert's shares to the rows that chose it.

    Returns:
        The shares, and a number that is there when the expert has been read: the shares
        themselves are given away to the next program.
    """
    kernels = KERNELS[placement.kernels]
    if kernels.layout == "slots":
        expert = ExpertWeights(*(ExpertSlots((w,)) if takes_slots(w) else w for w in expert))
    ids = jnp.where(routing.expert_ids == expert_id, 0, 1)  # counted from the one that is here
    shares = kernels.routed_experts(
        shares,
        rows,
        ids,
        routing.expert_weights,
        routing.valid,
        expert,
        expected=ids.size / num_experts,
    )
    return shares, shares[0, 0]


def _hidden(x: Any, begun_cache: Any, routing: tuple[Routing, ...]) -> Hidden:
    none = jnp.zeros((len(routing),), jnp.int32)
    return Hidden(x, begun_cache, (), routing, none, none)


@_jit
def end_prefill(
    state: DecodeState,
    start: Start,
    routing: tuple[Routing, ...],
    tokens: Int[Array, "B T"],
    *,
    placement: LocalPlacement,
) -> DecodeState:
    """``steps.prefill`` after the layers; states without keys and values."""
    hidden = _hidden(None, start.cache, routing)
    return steps.has_read(state, hidden, tokens, start.valid, placement)


@functools.partial(_jit, donate_argnames=("state", "emitted"))
def end_step(
    ends: Mixtral,
    state: DecodeState,
    start: Start,
    x: Float[Array, "B T D"],
    shares: Float[Array, "N D"],
    routing: tuple[Routing, ...],
    rows: RowSampling,
    limits: Limits,
    emitted: Emitted,
    *,
    placement: LocalPlacement,
) -> tuple[DecodeState, Emitted, Bool[Array, ""]]:
    """``steps.write_tokens`` after the layers; states without keys and values.

    Returns:
        The state, what this call of ``decode_step`` has written so far, and whether all rows are
        done.
    """
    state = state._replace(is_done=state.is_done | limits.stopped)
    hidden = _hidden(ends.norm(_add(x, shares)), start.cache, routing)
    logits = ends.unembed(hidden.x, placement)
    draft = steps.nothing_drafted(x.shape[0])
    state, wrote = steps.has_written(state, hidden, logits, draft, rows, limits, placement)
    return state, steps.append(emitted, wrote.emitted), state.is_done.all()


@_jit
def end_score(
    ends: Mixtral,
    x: Float[Array, "B T D"],
    shares: Float[Array, "N D"],
    *,
    placement: LocalPlacement,
) -> Float[Array, "B T V"]:
    """Logits of every position, f32."""
    return ends.unembed(ends.norm(_add(x, shares)), placement)
