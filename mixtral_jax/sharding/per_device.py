"""Capacity per device: a row goes once to a device, however many of its experts are there.

The device applies the row's experts with their weights and sends one sum back. Two exchanges:

``all_to_all_once``  every source offers each device C rows, C = ceil(capacity_factor * n * p);
``ragged``           rows travel without padding (``jax.lax.ragged_all_to_all``) into a buffer that
                     all sources share, of ceil(capacity_factor * n * S * p) rows.

p is the share of rows that a device sees under uniform routing: 1 - C(E - E/S, A) / C(E, A) for S
expert shards, A / E where each holds one expert.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.table import Kernels
from mixtral_jax.model.placement import Routing
from mixtral_jax.sharding.mesh import AXES
from mixtral_jax.sharding.per_expert import Plan


def visit_share(num_experts: int, shards: int, top_k: int) -> float:
    """The share of rows that has an expert on a given device, under uniform routing."""
    elsewhere = math.comb(num_experts - num_experts // shards, top_k)
    return 1 - elsewhere / math.comb(num_experts, top_k)


def device_capacity(
    num_rows: int, top_k: int, *, num_experts: int, shards: int, factor: float
) -> int:
    """Rows that a shard of ``num_rows`` offers each device; at most all of them."""
    # Rounded: 1 - 6/8 and 2/8 must give the same rows.
    share = round(factor * num_rows * visit_share(num_experts, shards, top_k), 9)
    return min(num_rows, math.ceil(share))


def shared_buffer(
    num_rows: int, top_k: int, *, num_experts: int, shards: int, factor: float
) -> int:
    """Rows of the buffer of a device that ``shards`` shards of ``num_rows`` share (``ragged``)."""
    rows = num_rows * shards
    return device_capacity(rows, top_k, num_experts=num_experts, shards=shards, factor=factor)


def visit_local(
    x: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    kernels: Kernels,
    *,
    expected: float,
    same_over: tuple[str, ...],
) -> jax.Array:
    """Inside shard_map: this device's experts on all rows given; f32 partial sums.

    Devices take different branches in there, so nothing in there may be a collective. The transpose
    of using a replicated value on a varying path is one (a psum): everything is marked as varying
    before. (Factors that lie whole along ``tensor`` are not: the devices of a tensor axis have the
    same rows and experts, and take the same branch.) ``same_over`` names the axes that the rows are
    replicated over; experts are over data. ``expected``: rows of an expert if all are chosen
    equally often.
    """
    x, routing = jax.lax.pcast((x, routing), same_over, to="varying")
    weights = jax.lax.pcast(weights, "data", to="varying")
    out = jax.lax.pcast(jnp.zeros(x.shape, jnp.float32), AXES, to="varying")
    first = jax.lax.axis_index("expert") * weights.gate.shape[0]
    return kernels.routed_experts(
        out,
        x,
        routing.expert_ids - first,
        routing.expert_weights,
        routing.valid,
        weights,
        expected=expected,
    )


class Visits(NamedTuple):
    """Which rows go to which of S devices, and in what order: first choices first, then by token.

    ``place`` counts a row among those of its device; ``choice`` is the row's first choice that lies
    there (A where none does).
    """

    place: Int[Array, "N S"]
    choice: Int[Array, "N S"]


def find_visits(
    expert_ids: Int[Array, "N A"], valid: Bool[Array, " N"], *, num_experts: int, shards: int
) -> Visits:
    """Padding visits nobody."""
    n, top_k = expert_ids.shape
    device = expert_ids // (num_experts // shards)
    there = (device[:, :, None] == jnp.arange(shards)) & valid[:, None, None]  # [n, A, S]
    choices = jnp.arange(top_k, dtype=jnp.int32)[None, :, None]
    choice = jnp.where(there, choices, top_k).min(axis=1)
    first_there = there & (choice[:, None, :] == choices)
    in_order = first_there.swapaxes(0, 1).reshape(top_k * n, shards).astype(jnp.int32)
    places = (jnp.cumsum(in_order, axis=0) - 1) * in_order
    return Visits(places.reshape(top_k, n, shards).sum(axis=0), choice)


class DeviceSlots(NamedTuple):
    """A shard's rows in the order of its send buffer.

    ``row_of_slot`` is n for a free slot; ``slot_of_choice`` is out of range for a choice without
    room, and for all but the first of several on one device: its device sends one sum for them.
    """

    row_of_slot: Int[Array, " slots"]
    slot_of_choice: Int[Array, "N A"]
    dropped: Int[Array, ""]


def assign_device_slots(
    visits: Visits,
    expert_ids: Int[Array, "N A"],
    valid: Bool[Array, " N"],
    *,
    num_experts: int,
    room: Int[Array, " S"],
    starts: Int[Array, " S"],
    num_slots: int,
) -> DeviceSlots:
    """Gives each visit a slot: device d has ``room[d]`` of them from ``starts[d]`` on."""
    n, top_k = expert_ids.shape
    shards = room.shape[0]
    goes = (visits.choice < top_k) & (visits.place < room)
    slot = jnp.where(goes, starts + visits.place, num_slots)  # [n, S]
    rows = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[:, None], slot.shape)
    row_of_slot = jnp.full((num_slots,), n, jnp.int32).at[slot].set(rows, mode="drop")
    device = expert_ids // (num_experts // shards)
    is_first = jnp.take_along_axis(visits.choice, device, axis=1) == jnp.arange(top_k)
    slot_of_choice = jnp.where(is_first, jnp.take_along_axis(slot, device, axis=1), num_slots)
    stays = jnp.take_along_axis(goes, device, axis=1)
    dropped = (valid[:, None] & ~stays).sum(dtype=jnp.int32)
    return DeviceSlots(row_of_slot, slot_of_choice, dropped)


def _take_rows(x: jax.Array, routing: Routing, slots: DeviceSlots) -> tuple[jax.Array, jax.Array]:
    """Rows in slot order, and beside them their expert ids (-1 in free slots) and weights, f32."""
    ids = routing.expert_ids.at[slots.row_of_slot].get(mode="fill", fill_value=-1)
    shares = routing.expert_weights.at[slots.row_of_slot].get(mode="fill", fill_value=0)
    beside = jnp.concatenate([ids.astype(jnp.float32), shares], axis=1)
    return x.at[slots.row_of_slot].get(mode="fill", fill_value=0), beside


def _visit(
    rows: jax.Array,
    beside: jax.Array,
    is_row: Bool[Array, " N"],
    weights: ExpertWeights,
    kernels: Kernels,
    expected: float,
) -> jax.Array:
    """What a device does with the rows that arrived; their sums, in the dtype of the rows."""
    ids, shares = jnp.split(beside, 2, axis=1)
    ids = ids.astype(jnp.int32)
    routing = Routing(ids, shares, is_row & (ids[:, 0] >= 0))
    done = visit_local(rows, routing, weights, kernels, expected=expected, same_over=("tensor",))
    return done.astype(rows.dtype)


def _sum_choices(back: jax.Array, slots: DeviceSlots) -> Float[Array, "N D"]:
    results = back.at[slots.slot_of_choice].get(mode="fill", fill_value=0)  # [n, A, D]
    return results.astype(jnp.float32).sum(axis=1)


def plan_once(routing: Routing, *, num_experts: int, factor: float, kernels: Kernels) -> Plan:
    """Inside shard_map: what ``all_to_all_once`` does with this device's rows."""
    n, top_k = routing.expert_ids.shape
    shards = jax.lax.axis_size("expert")
    room = device_capacity(n, top_k, num_experts=num_experts, shards=shards, factor=factor)
    ids, valid = routing.expert_ids, routing.valid
    slots = assign_device_slots(
        find_visits(ids, valid, num_experts=num_experts, shards=shards),
        ids,
        valid,
        num_experts=num_experts,
        room=jnp.full((shards,), room),
        starts=jnp.arange(shards) * room,
        num_slots=shards * room,
    )
    expected = n * shards * top_k / num_experts
    exchange = functools.partial(
        jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0, tiled=True
    )

    def run(x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        rows, beside = map(exchange, _take_rows(x, routing, slots))
        done = _visit(rows, beside, jnp.ones(rows.shape[:1], bool), weights, kernels, expected)
        return _sum_choices(exchange(done), slots)

    return Plan(slots.dropped, run)


class Exchange(NamedTuple):
    """Rows from every source to every device, ``[S, S]``, cut to what fits each device's buffer."""

    rows: Int[Array, "S S"]

    @classmethod
    def cut(cls, wanted: Int[Array, "S S"], buffer: int) -> Exchange:
        """Sources are served in order until the buffer of ``buffer`` rows is full."""
        before = jnp.cumsum(wanted, axis=0) - wanted
        return cls(jnp.clip(buffer - before, 0, wanted))

    @property
    def send_starts(self) -> Int[Array, "S S"]:
        """Where the rows of (source, device) begin in the source's send buffer."""
        return jnp.cumsum(self.rows, axis=1) - self.rows

    @property
    def receive_starts(self) -> Int[Array, "S S"]:
        """Where they begin in the device's receive buffer."""
        return jnp.cumsum(self.rows, axis=0) - self.rows


def plan_ragged(routing: Routing, *, num_experts: int, factor: float, kernels: Kernels) -> Plan:
    """Inside shard_map: what ``ragged`` does with this device's rows."""
    n, top_k = routing.expert_ids.shape
    shards, me = jax.lax.axis_size("expert"), jax.lax.axis_index("expert")
    ids, valid = routing.expert_ids, routing.valid
    visits = find_visits(ids, valid, num_experts=num_experts, shards=shards)
    buffer = shared_buffer(n, top_k, num_experts=num_experts, shards=shards, factor=factor)
    expected = n * shards * top_k / num_experts
    wanted = jax.lax.all_gather((visits.choice < top_k).sum(axis=0, dtype=jnp.int32), "expert")
    traffic = Exchange.cut(wanted, buffer)
    slots = assign_device_slots(
        visits,
        ids,
        valid,
        num_experts=num_experts,
        room=traffic.rows[me],
        starts=traffic.send_starts[me],
        num_slots=n * min(top_k, shards),
    )

    def there(rows: jax.Array) -> jax.Array:
        return ragged_exchange(
            rows,
            _zeros(buffer, rows, ("data", "expert")),
            traffic.send_starts[me],
            traffic.rows[me],
            traffic.receive_starts[me],
            traffic.rows[:, me],
        )

    def back(rows: jax.Array) -> jax.Array:
        return ragged_exchange(
            rows,
            _zeros(slots.row_of_slot.shape[0], rows, AXES),
            traffic.receive_starts[:, me],
            traffic.rows[:, me],
            traffic.send_starts[:, me],
            traffic.rows[me],
        )

    def run(x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        rows, beside = map(there, _take_rows(x, routing, slots))
        is_row = jnp.arange(buffer) < traffic.rows[:, me].sum()
        done = _visit(rows, beside, is_row, weights, kernels, expected)
        return _sum_choices(back(done), slots)

    return Plan(slots.dropped, run)


def _zeros(num_rows: int, like: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A buffer for rows that differ along these mesh axes."""
    return jax.lax.pcast(jnp.zeros((num_rows, like.shape[1]), like.dtype), axes, to="varying")


def ragged_exchange(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
) -> jax.Array:
    """``jax.lax.ragged_all_to_all`` over ``expert``; on the CPU, which lacks it, by a gather."""
    return jax.lax.platform_dependent(
        operand,
        output,
        input_offsets,
        send_sizes,
        output_offsets,
        recv_sizes,
        cpu=_ragged_by_gather,
        default=functools.partial(jax.lax.ragged_all_to_all, axis_name="expert"),
    )


def _ragged_by_gather(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
) -> jax.Array:
    """The reference: everybody sees every buffer and keeps its own rows."""
    del recv_sizes
    me, end = jax.lax.axis_index("expert"), output.shape[0]
    gather = functools.partial(jax.lax.all_gather, axis_name="expert")
    first, size, to = (gather(a)[:, me] for a in (input_offsets, send_sizes, output_offsets))
    at = jnp.arange(operand.shape[0]) - first[:, None]  # [S, slots]
    mine = (at >= 0) & (at < size[:, None])
    target = jnp.where(mine, to[:, None] + at, end)
    return output.at[target].set(gather(operand), mode="drop")
