"""Routed experts for a few rows on a CPU: one assignment after another, in quantized weights.

A loop of as many turns as there are assignments, each one row through one expert of the stack
(``kernels/cpu_rows.py``), so its program is one expert's, whatever their number. Experts that no
row chose are not read, and a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.cpu_product import cpu_product
from mixtral_jax.kernels.cpu_rows import Picked, pick, row_product
from mixtral_jax.kernels.experts import ExpertWeights, visit_experts
from mixtral_jax.kernels.widen import is_widened, split_inputs
from mixtral_jax.qtensor import QTensor

FEW_ROWS = 8  # more, and an expert's codes are widened once for all rows that chose it


def takes_rows(experts: ExpertWeights) -> bool:
    """Whether ``row_experts`` takes these weights: stacks of codes that lie within bytes."""
    return all(is_widened(w) for w in experts)


class _Turn(NamedTuple):
    """What a turn reads, made by the turn before.

    What a turn made itself would be made again for every element of its products.
    """

    x: tuple[list[jax.Array], list[jax.Array]]
    picked: tuple[Picked, Picked, Picked]
    row: jax.Array
    share: jax.Array


def _run(out: Any, x: Any, expert_ids: Any, expert_weights: Any, valid: Any, experts: Any) -> Any:
    gate, up, down = experts
    num_experts, F, D = gate.shape
    is_local = valid[:, None] & (expert_ids >= 0) & (expert_ids < num_experts)
    order = jnp.argsort(~is_local.reshape(-1), stable=True)
    ids = jnp.clip(expert_ids.reshape(-1)[order], 0, num_experts - 1)

    def turn(i: jax.Array) -> _Turn:
        i = jnp.minimum(i, len(ids) - 1)
        e, row = ids[i], order[i] // expert_ids.shape[1]

        def inputs(w: QTensor) -> list[jax.Array]:
            one = x[row] if w.order is None else x[row][w.order[e]]
            return split_inputs(one.astype(jnp.float32), w)

        # Hidden channels in the order in which `down` holds them.
        hidden = jnp.arange(F) if down.order is None else down.order[e]
        picked = pick(gate, e, hidden), pick(up, e, hidden), pick(down, e, jnp.arange(D))
        share = expert_weights.reshape(-1)[order[i]]
        return _Turn((inputs(gate), inputs(up)), picked, row, share)

    def body(carry: tuple[jax.Array, jax.Array, _Turn]):
        # With the barrier nothing that is made of the weights leaves the loop.
        (i, out, now), weights = jax.lax.optimization_barrier((carry, (gate, up, down)))
        gated, upped = (
            row_product(part, w, picked)
            for part, w, picked in zip(now.x, weights[:2], now.picked[:2], strict=True)
        )
        # Split before SiLU: each part is then made once, and by itself.
        split = zip(split_inputs(gated, down), split_inputs(upped, down), strict=True)
        hidden = [(jax.nn.silu(a) * b).astype(x.dtype).astype(jnp.float32) for a, b in split]
        y = row_product(hidden, weights[2], now.picked[2])
        return i + 1, out.at[now.row].add(now.share * y), turn(i + 1)

    count = is_local.sum()
    start = jnp.int32(0), out, turn(jnp.int32(0))
    # In a shard_map the barrier makes all vary as the weights do, so the first turn must as well.
    start, _ = jax.lax.optimization_barrier((start, (gate, up, down)))
    return jax.lax.while_loop(lambda carry: carry[0] < count, body, start)[1]


@jax.custom_vjp
def row_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
) -> Float[Array, "N D"]:
    """``visit_experts`` for stacks that ``takes_rows`` accepts; gradients are those of that one."""
    return _run(out, x, expert_ids, expert_weights, valid, experts)


def _forward(*operands: Any) -> tuple[jax.Array, tuple]:
    return _run(*operands), operands


def _backward(operands: tuple, ct: jax.Array) -> tuple:
    def visit(*operands: Any) -> jax.Array:
        return visit_experts(*operands, expected=operands[1].shape[0], product=cpu_product)

    return jax.vjp(visit, *operands)[1](ct)


row_experts.defvjp(_forward, _backward)


def cpu_routed_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    expected: float,
) -> Float[Array, "N D"]:
    """``visit_experts`` with the CPU's products, or ``row_experts`` for few rows where it can."""
    operands = (out, x, expert_ids, expert_weights, valid, experts)
    if x.shape[0] <= FEW_ROWS and takes_rows(experts):
        return row_experts(*operands)
    return visit_experts(*operands, expected=expected, product=cpu_product)
