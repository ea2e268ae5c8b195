"""Rows sorted by expert, and products of groups of rows with a stack of matrices.

``schedule`` serves every routed path on stacked weights. The products are ``jax.lax.ragged_dot``'s:
XLA lowers them on GPUs (to cuDNN, where it can) and TPUs; on the CPU every expert would multiply
every row, which is why the CPU visits whole experts instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.experts import ExpertWeights


class Schedule(NamedTuple):
    """Assignments in blocks of equally many slots, one expert to a block, experts in order.

    ``block_expert`` is E for blocks past the last that is used; ``row_of_slot`` is N for a slot
    without a row; ``slot_of_choice`` is past the end for an assignment that is ignored.
    """

    block_expert: Int[Array, " blocks"]
    row_of_slot: Int[Array, " slots"]
    slot_of_choice: Int[Array, "N A"]
    blocks_of_expert: Int[Array, " E"]


def schedule(
    expert_ids: Int[Array, "N A"], valid: Bool[Array, " N"], *, num_experts: int, block_rows: int
) -> Schedule:
    """Gives every assignment a slot; each expert begins a block of its own.

    The number of blocks is static, the most that any routing can fill:
    ``sum ceil(n_e / R) <= (M + min(E, M) (R - 1)) / R`` for M assignments and blocks of R.

    Args:
        expert_ids: chosen experts; outside ``0 .. num_experts - 1`` they are ignored.
        valid: false for padding, which is ignored.
        num_experts: experts held here.
        block_rows: slots per block.
    """
    n, top_k = expert_ids.shape
    assignments = n * top_k
    blocks = (assignments + min(num_experts, assignments) * (block_rows - 1)) // block_rows
    ids = jnp.where(valid[:, None], expert_ids, num_experts).reshape(-1)
    is_of = ids[:, None] == jnp.arange(num_experts)  # [N A, E]
    places = jnp.cumsum(is_of.astype(jnp.int32), axis=0)
    blocks_of_expert = -(-is_of.sum(axis=0, dtype=jnp.int32) // block_rows)
    ends = jnp.cumsum(blocks_of_expert)
    at = (ends - blocks_of_expert) * block_rows + places - 1
    slot = jnp.where(is_of, at, 0).sum(axis=1)
    slot = jnp.where(is_of.any(axis=1), slot, blocks * block_rows)
    rows = jnp.repeat(jnp.arange(n, dtype=jnp.int32), top_k)
    row_of_slot = jnp.full((blocks * block_rows,), n, jnp.int32).at[slot].set(rows, mode="drop")
    block_expert = (jnp.arange(blocks)[:, None] >= ends).sum(axis=1, dtype=jnp.int32)
    return Schedule(block_expert, row_of_slot, slot.reshape(n, top_k), blocks_of_expert)


def apply_schedule(
    feed_forward: Callable[[jax.Array, ExpertWeights, Schedule], jax.Array],
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    block_rows: int,
) -> Float[Array, "N D"]:
    """Adds each expert's share to the rows that chose it; arguments as for ``visit_experts``.

    ``feed_forward`` gets the rows in slots (zeros in slots without a row) and gives f32 results per
    slot; whatever it leaves in slots without a row is not read. Sums are in the order of the
    choices, whatever the order in slots.
    """
    num_experts = experts.gate.shape[0]
    plan = schedule(expert_ids, valid, num_experts=num_experts, block_rows=block_rows)
    done = feed_forward(x.at[plan.row_of_slot].get(mode="fill", fill_value=0), experts, plan)
    back = done.at[plan.slot_of_choice].get(mode="fill", fill_value=0)  # [N, A, D]
    return out + (expert_weights[:, :, None] * back).sum(axis=1)


def stacks(experts: ExpertWeights) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three leaves, which must be arrays."""
    gate, up, down = experts
    assert isinstance(gate, jax.Array)
    assert isinstance(up, jax.Array)
    assert isinstance(down, jax.Array)
    return gate, up, down


def _ragged(
    a: jax.Array,
    b: jax.Array,
    sizes: jax.Array,
    contracting: tuple[int, int],
    *,
    is_grouped: bool = True,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Product of groups of rows of ``a``: with matrices of b if grouped, else with its rows."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contracting[0],), (contracting[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0] if is_grouped else [],
    )
    # HIGHEST: f32 means f32 (a GPU would round the operands to TF32).
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.ragged_dot_general(
        a, b, sizes, numbers, precision=precision, preferred_element_type=dtype
    )


@jax.custom_vjp
def grouped_dot(
    x: Float[Array, "M I"], w: Float[Array, "E O I"], sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """Row m times the matrix of its group, f32; ``sizes`` are the groups' rows, in order.

    Rows past the last group get anything. The gradient is written out because JAX's own would
    widen all weights to the f32 of the result: here cotangents are rounded to the dtype of ``x``.
    """
    return _ragged(x, w, sizes, (1, 2))


def _forward(x: jax.Array, w: jax.Array, sizes: jax.Array):
    return grouped_dot(x, w, sizes), (x, w, sizes)


def _backward(kept: tuple[jax.Array, jax.Array, jax.Array], ct: jax.Array):
    x, w, sizes = kept
    ct = ct.astype(x.dtype)
    into_x = _ragged(ct, w, sizes, (1, 1), dtype=x.dtype)
    into_w = _ragged(ct, x, sizes, (0, 0), is_grouped=False, dtype=w.dtype)
    return into_x, into_w, None


grouped_dot.defvjp(_forward, _backward)


def grouped_feed_forward(
    x: Float[Array, "M D"], experts: ExpertWeights, sizes: Int[Array, " E"]
) -> Float[Array, "M D"]:
    """Rows sorted by expert through their experts, f32; rows past the last group get anything."""
    gate, up, down = stacks(experts)
    hidden = jax.nn.silu(grouped_dot(x, gate, sizes)) * grouped_dot(x, up, sizes)
    return grouped_dot(hidden.astype(x.dtype), down, sizes)


def grouped_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    expected: float,
) -> Float[Array, "N D"]:
    """``visit_experts`` on stacked arrays, by three grouped products over sorted rows."""
    del expected

    def feed_forward(rows: jax.Array, experts: ExpertWeights, plan: Schedule) -> jax.Array:
        return grouped_feed_forward(rows, experts, plan.blocks_of_expert)

    routed = functools.partial(apply_schedule, feed_forward, block_rows=1)
    return routed(out, x, expert_ids, expert_weights, valid, experts)


def batched_blocks(x: Float[Array, "E N D"], experts: ExpertWeights) -> Float[Array, "E N D"]:
    """``expert_blocks`` on stacked arrays: batched products, no slice of the stack; f32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    gate, up, down = stacks(experts)
    hidden = jax.nn.silu(product("END,EFD->ENF", x, gate)) * product("END,EFD->ENF", x, up)
    return product("ENF,EDF->END", hidden.astype(x.dtype), down)
