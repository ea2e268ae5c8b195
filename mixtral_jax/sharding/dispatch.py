"""Expert dispatch: rows to the devices that hold their experts, and back.

Every method has one signature and one result, ``Routed(y, dropped)``; no shape depends on routing.

``all_to_all``  rows over data x expert; every shard offers C rows per expert, C =
                ceil(capacity_factor * n * A / E) for its n rows: first choices first, then in token
                order; two all-to-alls carry them there and back (GShard, Lepikhin et al. 2020).
                Where an assignment finds no room, ``overflow="exact"`` takes the gathered path for
                the layer, on every device alike, and ``"drop"`` leaves it out and counts it.
``gathered``    all-gather of the rows, psum_scatter of the results; dropless.
``replicated``  every expert shard sees the rows of its data shard, one psum; dropless.

Which one: ``choose``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.table import Kernels
from mixtral_jax.model.placement import Routed, Routing
from mixtral_jax.sharding.mesh import AXES
from mixtral_jax.sharding.rules import WEIGHT_RULES, kind_specs, partition_spec

Method = Literal["auto", "all_to_all", "gathered", "replicated"]
Overflow = Literal["exact", "drop"]

# Below this many rows per device latency counts and not bytes: one collective instead of two, no
# slots to assign, and experts that nobody chose are not read. Reasoned, not measured.
REPLICATED_BELOW = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchOptions:
    """How rows travel.

    Attributes:
        method: ``auto`` follows ``choose``.
        capacity_factor: rows offered per expert, as a multiple of a balanced load.
        overflow: what happens to assignments beyond the capacity.
    """

    method: Method = "auto"
    capacity_factor: float = 2.0
    overflow: Overflow = "exact"

    def __post_init__(self):
        for name, value, choices in (
            ("dispatch", self.method, get_args(Method)),
            ("overflow", self.overflow, get_args(Overflow)),
        ):
            if value not in choices:
                expected = ", ".join(choices)
                raise MixtralError(f"--{name}", expected=expected, got=repr(value), code=USAGE)
        if self.overflow == "drop" and self.method in ("gathered", "replicated"):
            raise MixtralError(
                f"--overflow drop with --dispatch {self.method}, which has no capacity to overflow",
                fix="--dispatch all_to_all",
                code=USAGE,
            )
        factor = self.capacity_factor
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise MixtralError(
                "--capacity-factor",
                expected="a positive number",
                got=repr(factor),
                code=USAGE,
            )


def choose(options: DispatchOptions, mesh: Mesh, num_rows: int) -> Method:
    """The rule: what was asked; else ``replicated`` for one expert shard or few rows per device
    (decode), else ``all_to_all`` (prefill, training).
    """
    if options.method != "auto":
        return options.method
    few = num_rows < REPLICATED_BELOW * mesh.shape["data"] * mesh.shape["expert"]
    return "replicated" if mesh.shape["expert"] == 1 or few else "all_to_all"


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


def _combine(back: jax.Array, slots: Slots, expert_weights: jax.Array) -> jax.Array:
    """Weighted sum of each row's results, f32; an assignment without room adds nothing."""
    chosen = back.at[slots.slot_of_choice].get(mode="fill", fill_value=0)  # [n, A, D]
    return (chosen.astype(jnp.float32) * expert_weights[..., None]).sum(axis=1)


def _visit_local(
    x: jax.Array,
    routing: Routing,
    weights: ExpertWeights,
    kernels: Kernels,
    *,
    same_over: tuple[str, ...],
) -> jax.Array:
    """Inside shard_map: this device's experts on all rows given; f32 partial sums.

    Devices take different branches in there, so nothing in there may be a collective. The transpose
    of using a replicated value on a varying path is one (a psum): everything is marked as varying
    before. ``same_over`` names the axes that the rows are replicated over; experts are over data.
    """
    x, routing = jax.lax.pcast((x, routing), same_over, to="varying")
    weights = jax.lax.pcast(weights, "data", to="varying")
    out = jax.lax.pcast(jnp.zeros(x.shape, jnp.float32), AXES, to="varying")
    first = jax.lax.axis_index("expert") * weights.gate.shape[0]
    num_experts = weights.gate.shape[0] * jax.lax.axis_size("expert")
    return kernels.routed_experts(
        out,
        x,
        routing.expert_ids - first,
        routing.expert_weights,
        routing.valid,
        weights,
        num_experts=num_experts,
    )


def _gathered(x: jax.Array, routing: Routing, weights: ExpertWeights, kernels: Kernels):
    """Inside shard_map: gathers the rows of the expert axis, visits own experts, scatters the sums.

    Each device holds n rows and its experts; between the collectives it holds the rows of its whole
    expert axis. Result: f32 ``[n, D]``, partial over ``tensor``.
    """
    gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    everyone = Routing(*(gather(part) for part in routing))
    partial = _visit_local(gather(x), everyone, weights, kernels, same_over=("tensor",))
    return jax.lax.psum_scatter(partial, "expert", tiled=True)


def _all_to_all_shard(
    x: Float[Array, "N D"],
    routing: Routing,
    weights: ExpertWeights,
    *,
    num_experts: int,
    options: DispatchOptions,
    kernels: Kernels,
) -> Routed:
    """What one device does under ``all_to_all``; it holds n rows of data x expert and its experts.

    The count of overflowing assignments is summed over all devices first, so that every device
    takes the same branch and meets the same collectives.
    """
    room = capacity(x.shape[0], routing.expert_ids.shape[1], num_experts, options.capacity_factor)
    slots = assign_slots(routing.expert_ids, routing.valid, num_experts=num_experts, room=room)
    dropped = jax.lax.psum(slots.dropped, ("data", "expert"))

    def by_capacity(x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        return _combine(send(x, slots, weights, kernels), slots, routing.expert_weights)

    if options.overflow == "drop":
        y = by_capacity(x, routing, weights)
    else:
        everything = functools.partial(_gathered, kernels=kernels)
        y = jax.lax.cond(dropped > 0, everything, by_capacity, x, routing, weights)
        dropped = jnp.zeros_like(dropped)
    return Routed(jax.lax.psum(y, "tensor").astype(x.dtype), dropped)


def _gathered_shard(x, routing: Routing, weights: ExpertWeights, *, kernels: Kernels) -> Routed:
    """What one device does under ``gathered``."""
    y = jax.lax.psum(_gathered(x, routing, weights, kernels), "tensor")
    return Routed(y.astype(x.dtype), jnp.zeros((), jnp.int32))


def _replicated_shard(x, routing: Routing, weights: ExpertWeights, *, kernels: Kernels) -> Routed:
    """What one device does under ``replicated``: it holds all rows of its data shard."""
    partial = _visit_local(x, routing, weights, kernels, same_over=("expert", "tensor"))
    y = jax.lax.psum(partial, ("expert", "tensor"))
    return Routed(y.astype(x.dtype), jnp.zeros((), jnp.int32))


def dispatch(
    x: Float[Array, "N D"],
    routing: Routing,
    weights: ExpertWeights,
    *,
    mesh: Mesh,
    options: DispatchOptions,
    kernels: Kernels,
) -> Routed:
    """Applies each row's experts on a mesh.

    Args:
        x: rows, any number (padded here to divide the mesh).
        routing: where they go.
        weights: the experts, sharded over ``expert`` (and ``tensor`` inside).
        mesh: axes data, expert, tensor.
        options: how they travel.
        kernels: what computes them.

    Returns:
        Routed: results in the dtype of ``x``, and the dropped assignments over all devices (always
        0 unless ``overflow="drop"``).
    """
    method = choose(options, mesh, x.shape[0])
    over = ("data",) if method == "replicated" else ("data", "expert")
    padding = -x.shape[0] % math.prod(mesh.shape[axis] for axis in over)
    rows_x, rows_routing = jax.tree.map(
        lambda a: jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)), (x, routing)
    )
    if method == "all_to_all":
        shard_fn = functools.partial(
            _all_to_all_shard, num_experts=weights.gate.shape[0], options=options, kernels=kernels
        )
    else:
        shard_fn = functools.partial(
            {"gathered": _gathered_shard, "replicated": _replicated_shard}[method], kernels=kernels
        )
    rows: Any = PartitionSpec(over)
    everywhere: Any = PartitionSpec()
    into = partition_spec(("expert", "mlp", "embed"), WEIGHT_RULES)
    back = partition_spec(("expert", "embed", "mlp"), WEIGHT_RULES)
    specs = ExpertWeights(
        kind_specs(weights.gate, into), kind_specs(weights.up, into), kind_specs(weights.down, back)
    )
    routed = jax.shard_map(
        shard_fn,
        mesh=mesh,
        in_specs=(rows, Routing(rows, rows, rows), specs),
        out_specs=Routed(rows, everywhere),
    )(rows_x, rows_routing, weights)
    return routed._replace(y=routed.y[: x.shape[0]])
