"""Capacity per expert: each source device offers every expert the same number of rows (GShard)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.table import Kernels
from mixtral_jax.model.placement import Routing


class Plan(NamedTuple):
    """How a device's rows will travel.

    ``dropped`` counts this device's assignments without room; ``run(x, routing, weights)`` gives
    the f32 sums of those with room, partial over ``tensor``.
    """

    dropped: Int[Array, ""]
    run: Callable[[jax.Array, Routing, ExpertWeights], jax.Array]


def capacity(num_rows: int, top_k: int, num_experts: int, factor: float) -> int:
    """Rows that a shard of ``num_rows`` offers each expert: ceil(factor * n * A / E), at most n."""
    if factor * top_k >= num_experts:
        return num_rows  # no expert is chosen by more rows than there are
    return math.ceil(factor * num_rows * top_k / num_experts)


class Slots(NamedTuple):
    """A shard's offers: which row stands in each of the E * C slots, and where each assignment is.

    A free slot holds row ``n``, an assignment without room has slot ``E * C``: both out of range.
    """

    row_of_slot: Int[Array, " slots"]
    slot_of_choice: Int[Array, "N A"]
    dropped: Int[Array, ""]


def assign_slots(
    expert_ids: Int[Array, "N A"], valid: Bool[Array, " N"], *, num_experts: int, room: int
) -> Slots:
    """Gives each assignment a slot of its expert: first choices first, then in token order.

    Padding takes none. ``dropped`` counts the assignments of valid rows that found no room.
    """
    n, top_k = expert_ids.shape
    in_order = expert_ids.T.reshape(-1)  # all first choices, then all second choices, ...
    is_row = jnp.tile(valid, top_k)
    wants = jax.nn.one_hot(in_order, num_experts, dtype=jnp.int32) * is_row[:, None]
    place = jnp.take_along_axis(jnp.cumsum(wants, axis=0) - 1, in_order[:, None], axis=1)[:, 0]
    has_room = is_row & (place < room)
    end = num_experts * room
    slot = jnp.where(has_room, in_order * room + place, end)
    rows = jnp.tile(jnp.arange(n, dtype=jnp.int32), top_k)
    row_of_slot = jnp.full((end,), n, jnp.int32).at[slot].set(rows, mode="drop")
    dropped = (is_row & ~has_room).sum(dtype=jnp.int32)
    return Slots(row_of_slot, slot.reshape(top_k, n).T, dropped)


def send(x: jax.Array, slots: Slots, weights: ExpertWeights, kernels: Kernels) -> jax.Array:
    """Inside shard_map: the rows in ``slots`` to their experts and back, in slot order.

    Each device holds its own n rows and whole or tensor-split experts ``shard * E_local + i``. The
    first all-to-all gives it, from every expert shard, that shard's C rows for each of its experts;
    the second gives the results back to the rows' owners. Results are partial sums over ``tensor``.
    """
    shards = jax.lax.axis_size("expert")
    offered = x.at[slots.row_of_slot].get(mode="fill", fill_value=0)  # [E * C, D]
    arrived = jax.lax.all_to_all(offered, "expert", 0, 0, tiled=True)
    local = weights.gate.shape[0]
    blocks = arrived.reshape(shards, local, -1, x.shape[-1]).swapaxes(0, 1)
    blocks = blocks.reshape(local, -1, x.shape[-1])
    done = kernels.expert_blocks(blocks, weights).astype(x.dtype)
    done = done.reshape(local, shards, -1, x.shape[-1]).swapaxes(0, 1)
    return jax.lax.all_to_all(done.reshape(offered.shape), "expert", 0, 0, tiled=True)


def combine(back: jax.Array, slots: Slots, routing: Routing) -> jax.Array:
    """Weighted sum of each row's results, f32; an assignment without room adds nothing."""
    chosen = back.at[slots.slot_of_choice].get(mode="fill", fill_value=0)  # [n, A, D]
    return (chosen.astype(jnp.float32) * routing.expert_weights[..., None]).sum(axis=1)


def plan(routing: Routing, *, num_experts: int, factor: float, kernels: Kernels) -> Plan:
    """Inside shard_map: what ``all_to_all`` does with this device's rows."""
    n, top_k = routing.expert_ids.shape
    room = capacity(n, top_k, num_experts, factor)
    slots = assign_slots(routing.expert_ids, routing.valid, num_experts=num_experts, room=room)

    def run(x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        return combine(send(x, slots, weights, kernels), slots, routing)

    return Plan(slots.dropped, run)
