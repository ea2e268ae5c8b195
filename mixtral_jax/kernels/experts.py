"""The expert feed-forward, for blocks of rows and for rows that chose their experts.

out = down(silu(gate(x)) * up(x)), as MixtralExperts of transformers (w2(silu(w1 x) * w3 x)).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.contract import contract
from mixtral_jax.weights import Matrix, Weight, expert_matrices

# The middle branch of `visit_experts` holds this many times the rows of a balanced expert.
ROOM = 1.5


class ExpertWeights(NamedTuple):
    """One layer's experts: gate and up ``[E, F, D]``, down ``[E, D, F]``, of any weight kind."""

    gate: Weight
    up: Weight
    down: Weight


def feed_forward(x: Float[Array, "N D"], gate: Matrix, up: Matrix, down: Matrix) -> jax.Array:
    """One expert applied to every row; f32 ``[N, D]``."""
    hidden = jax.nn.silu(contract("ND,FD->NF", x, gate, dtype=jnp.float32))
    hidden = hidden * contract("ND,FD->NF", x, up, dtype=jnp.float32)
    return contract("NF,DF->ND", hidden.astype(x.dtype), down, dtype=jnp.float32)


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
    return tuple(sorted({min(num_rows, 8 * math.ceil(ROOM * expected / 8)), num_rows}))


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

    No shape depends on the routing: each expert runs one of three compiled branches, none, some
    (``ROOM`` times a balanced load) or all rows, so nothing is ever dropped.

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
    matrices = _matrices(experts)
    some = ladder(num_rows, expected)[0]

    for e, expert in enumerate(matrices):
        chosen = (expert_ids == e) & valid[:, None]
        share = jnp.where(chosen, expert_weights, 0.0).sum(axis=-1)
        is_chosen = chosen.any(axis=-1)

        def none(out: jax.Array, share: jax.Array, is_chosen: jax.Array) -> jax.Array:
            del share, is_chosen
            return out

        def few(
            out: jax.Array, share: jax.Array, is_chosen: jax.Array, expert: tuple = expert
        ) -> jax.Array:
            rows = jnp.argsort(~is_chosen, stable=True)[:some]
            return out.at[rows].add(share[rows, None] * feed_forward(x[rows], *expert))

        def every(
            out: jax.Array, share: jax.Array, is_chosen: jax.Array, expert: tuple = expert
        ) -> jax.Array:
            del is_chosen
            return out + share[:, None] * feed_forward(x, *expert)

        count = is_chosen.sum()
        if some < num_rows:
            branch = (count > 0).astype(jnp.int32) + (count > some)
            branches = [none, few, every]
        else:
            branch = (count > 0).astype(jnp.int32)
            branches = [none, every]
        out = jax.lax.switch(branch, branches, out, share, is_chosen)
    return out
