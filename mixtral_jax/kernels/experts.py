"""The expert feed-forward, for blocks of rows and for rows that chose their experts.

out = down(silu(gate(x)) * up(x)), as MixtralExperts of transformers (w2(silu(w1 x) * w3 x)).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.contract import contract
from mixtral_jax.weights import Matrix, Weight, expert_matrices

# Branches of `visit_experts` between no rows and all rows, in rows of a balanced expert. Close
# around one, where most experts are: a branch computes all of its rows, taken or not.
RUNGS = (0.5, 1.0, 1.125, 1.5, 2.0)
FEW_RUNGS = (1.5,)  # for small blocks, which are bound by reading weights


class ExpertWeights(NamedTuple):
    """One layer's experts: gate and up ``[E, F, D]``, down ``[E, D, F]``, of any weight kind."""

    gate: Weight
    up: Weight
    down: Weight


def feed_forward(x: Float[Array, "N D"], gate: Matrix, up: Matrix, down: Matrix) -> jax.Array:
    """One expert applied to every row; f32 ``[N, D]``."""
    return contract("NF,DF->ND", gated(x, gate, up), down, dtype=jnp.float32)


def gated(x: Float[Array, "N D"], gate: Matrix, up: Matrix) -> Float[Array, "N F"]:
    """What ``down`` reads: silu(gate(x)) * up(x), computed in f32, in the dtype of ``x``."""
    hidden = jax.nn.silu(contract("ND,FD->NF", x, gate, dtype=jnp.float32))
    hidden = hidden * contract("ND,FD->NF", x, up, dtype=jnp.float32)
    return hidden.astype(x.dtype)


def _matrices(experts: ExpertWeights) -> list[tuple[Matrix, Matrix, Matrix]]:
    return list(zip(*map(expert_matrices, experts), strict=True))


def expert_blocks(x: Float[Array, "E N D"], experts: ExpertWeights) -> Float[Array, "E N D"]:
    """Block e through expert e; f32. Shapes are static: an empty row costs as much as another."""
    outs = [feed_forward(x[e], *expert) for e, expert in enumerate(_matrices(experts))]
    return jnp.stack(outs)


def dense_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    expected: float,
) -> Float[Array, "N D"]:
    """The reference of ``visit_experts``: every expert on every row, weighted by the routing."""
    del expected
    for e, expert in enumerate(_matrices(experts)):
        chosen = (expert_ids == e) & valid[:, None]
        share = jnp.where(chosen, expert_weights, 0.0).sum(axis=-1)
        out = out + share[:, None] * feed_forward(x, *expert)
    return out


def ladder(num_rows: int, expected: float) -> tuple[int, ...]:
    """Rows that the branches of ``visit_experts`` hold, ascending; the last holds all."""
    if expected >= num_rows:  # every row chooses every expert
        return (num_rows,)
    rungs = RUNGS if expected >= 32 else FEW_RUNGS
    sizes = {min(num_rows, 8 * math.ceil(rung * expected / 8)) for rung in rungs}
    return tuple(sorted(sizes | {num_rows}))


def visit_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    expected: float,
) -> Float[Array, "N D"]:
    """Adds each expert's share to the rows that chose it; experts that no row chose are not read.

    No shape depends on the routing: each expert runs one of a few compiled branches, for none of
    the rows, for as many as a rung of ``ladder`` or for all, so nothing is ever dropped.

    Args:
        out: f32 accumulator, returned with the shares added.
        x: rows.
        expert_ids: chosen experts, counted from the first of ``experts``; others are ignored.
        expert_weights: f32 routing weights.
        valid: false for padding, which visits no expert.
        experts: the experts held here.
        expected: rows of an expert if all are chosen equally often.

    Returns:
        The accumulator, f32.
    """
    num_rows = x.shape[0]
    sizes = ladder(num_rows, expected)
    chosen = (expert_ids[..., None] == jnp.arange(experts.gate.shape[0])) & valid[:, None, None]
    shares = jnp.where(chosen, expert_weights[..., None], 0.0).sum(axis=1)  # [N, E]
    is_chosen = chosen.any(axis=1)
    counts = is_chosen.sum(axis=0)
    branch = (counts[:, None] > jnp.asarray((0, *sizes[:-1]))).sum(axis=1)
    # Rows that chose an expert first. Sorted once, not in every branch: sorts compile slowly.
    orders = jnp.argsort(~is_chosen, axis=0, stable=True) if len(sizes) > 1 else is_chosen

    def none(out: jax.Array, share: jax.Array, order: jax.Array) -> jax.Array:
        del share, order
        return out

    def visit(
        size: int, expert: tuple, out: jax.Array, share: jax.Array, order: jax.Array
    ) -> jax.Array:
        if size == num_rows:
            return out + share[:, None] * feed_forward(x, *expert)
        rows = order[:size]
        return out.at[rows].add(share[rows, None] * feed_forward(x[rows], *expert))

    for e, expert in enumerate(_matrices(experts)):
        visits = [functools.partial(visit, size, expert) for size in sizes]
        out = jax.lax.switch(branch[e], [none, *visits], out, shares[:, e], orders[:, e])
    return out
