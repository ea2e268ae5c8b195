"""Expert dispatch: rows to the devices that hold their experts, and back.

Every method has one signature and one result, ``Routed``; no shape depends on routing.

``all_to_all``  rows over data x expert; every shard offers C rows per expert, C =
                ceil(capacity_factor * n * A / E) for its n rows: first choices first, then in token
                order; two all-to-alls carry them there and back (GShard, Lepikhin et al. 2020).
                Where an assignment finds no room, ``overflow="exact"`` takes the gathered path for
                the layer, on every device alike, and ``"drop"`` leaves it out and counts it.
``all_to_all_once``  the same, but a row goes once to a device that holds several of its experts;
``ragged``      and without padding, where the backend can (per_device.py).
``gathered``    all-gather of the rows, psum_scatter of the results; dropless.
``replicated``  every expert shard sees the rows of its data shard, one psum; dropless.

Which one: ``choose``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.table import Kernels
from mixtral_jax.model.placement import Routed, Routing
from mixtral_jax.sharding import per_device, per_expert
from mixtral_jax.sharding.per_device import visit_local
from mixtral_jax.sharding.per_expert import Plan
from mixtral_jax.sharding.rules import WEIGHT_RULES, kind_specs, partition_spec

Method = Literal["auto", "all_to_all", "all_to_all_once", "ragged", "gathered", "replicated"]
Overflow = Literal["exact", "drop"]

# Below this many rows per device latency counts and not bytes: one collective instead of two, no
# slots to assign, and experts that nobody chose are not read. Reasoned, not measured.
REPLICATED_BELOW = 16
MOST_CHUNKS = 8

# The methods with a capacity.
PLANS: dict[str, Callable[..., Plan]] = {
    "all_to_all": per_expert.plan,
    "all_to_all_once": per_device.plan_once,
    "ragged": per_device.plan_ragged,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchOptions:
    """How rows travel.

    Attributes:
        method: ``auto`` follows ``choose``.
        capacity_factor: rows offered, as a multiple of a balanced load.
        overflow: what happens to assignments beyond the capacity.
        chunks: parts that the rows of a layer travel in, under the methods with a capacity.
    """

    method: Method = "auto"
    capacity_factor: float = 2.0
    overflow: Overflow = "exact"
    chunks: int = 1

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
        if not isinstance(self.chunks, int) or not 1 <= self.chunks <= MOST_CHUNKS:
            expected, got = f"1 to {MOST_CHUNKS}", repr(self.chunks)
            raise MixtralError("dispatch chunks", expected=expected, got=got, code=USAGE)
        factor = self.capacity_factor
        if not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise MixtralError(
                "--capacity-factor",
                expected="a positive number",
                got=repr(factor),
                code=USAGE,
            )


def choose(options: DispatchOptions, mesh: Mesh, num_rows: int) -> Method:
    """The rule of ``choose_for`` on a mesh."""
    return choose_for(options, mesh.shape["data"], mesh.shape["expert"], num_rows)


def choose_for(options: DispatchOptions, data: int, expert: int, num_rows: int) -> Method:
    """The rule: what was asked; else ``replicated`` for one expert shard or few rows per device
    (decode), else ``all_to_all`` (prefill, training).
    """
    if options.method != "auto":
        return options.method
    few = num_rows < REPLICATED_BELOW * data * expert
    return "replicated" if expert == 1 or few else "all_to_all"


def _expected(routing: Routing, weights: ExpertWeights) -> float:
    """Inside shard_map: rows of an expert, of those routed to all experts of the layer."""
    return routing.expert_ids.size / (weights.gate.shape[0] * jax.lax.axis_size("expert"))


def _gathered(x: jax.Array, routing: Routing, weights: ExpertWeights, kernels: Kernels):
    """Inside shard_map: gathers the rows of the expert axis, visits own experts, scatters the sums.

    Each device holds n rows and its experts; between the collectives it holds the rows of its whole
    expert axis. Result: f32 ``[n, D]``, partial over ``tensor``.
    """
    gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
    everyone = Routing(*(gather(part) for part in routing))
    partial = visit_local(
        gather(x),
        everyone,
        weights,
        kernels,
        expected=_expected(everyone, weights),
        same_over=("tensor",),
    )
    return jax.lax.psum_scatter(partial, "expert", tiled=True)


def _capacity_shard(
    x: Float[Array, "N D"],
    routing: Routing,
    weights: ExpertWeights,
    *,
    make_plan: Callable[..., Plan],
    num_experts: int,
    options: DispatchOptions,
    kernels: Kernels,
) -> Routed:
    """What one device does under the methods with a capacity; it holds n rows and its experts.

    The count of overflowing assignments is summed over all devices first, so that every device
    takes the same branch and meets the same collectives. In chunks, one chunk's exchange can run
    beside another's products: nothing of one depends on the other.
    """
    size = x.shape[0] // options.chunks
    parts = [slice(i * size, (i + 1) * size) for i in range(options.chunks)]

    def cut(tree: Any, part: slice) -> Any:
        return jax.tree.map(lambda a: a[part], tree)

    plans = [
        make_plan(
            cut(routing, part),
            num_experts=num_experts,
            factor=options.capacity_factor,
            kernels=kernels,
        )
        for part in parts
    ]
    overflowed = sum((plan.dropped for plan in plans), jnp.zeros((), jnp.int32))
    overflowed = jax.lax.psum(overflowed, ("data", "expert"))

    def by_capacity(x: jax.Array, routing: Routing, weights: ExpertWeights) -> jax.Array:
        pairs = zip(plans, parts, strict=True)
        done = [plan.run(x[part], cut(routing, part), weights) for plan, part in pairs]
        return jnp.concatenate(done)

    if options.overflow == "drop":
        y, dropped = by_capacity(x, routing, weights), overflowed
    else:
        everything = functools.partial(_gathered, kernels=kernels)
        y = jax.lax.cond(overflowed > 0, everything, by_capacity, x, routing, weights)
        dropped = jnp.zeros_like(overflowed)
    return Routed(jax.lax.psum(y, "tensor").astype(x.dtype), dropped, overflowed)


def _gathered_shard(x, routing: Routing, weights: ExpertWeights, *, kernels: Kernels) -> Routed:
    """What one device does under ``gathered``."""
    y = jax.lax.psum(_gathered(x, routing, weights, kernels), "tensor")
    return Routed(y.astype(x.dtype), jnp.int32(0), jnp.int32(0))


def _replicated_shard(x, routing: Routing, weights: ExpertWeights, *, kernels: Kernels) -> Routed:
    """What one device does under ``replicated``: it holds all rows of its data shard."""
    partial = visit_local(
        x,
        routing,
        weights,
        kernels,
        expected=_expected(routing, weights),
        same_over=("expert", "tensor"),
    )
    y = jax.lax.psum(partial, ("expert", "tensor"))
    return Routed(y.astype(x.dtype), jnp.int32(0), jnp.int32(0))


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
        Routed: results in the dtype of ``x``, and over all devices the dropped assignments (always
        0 unless ``overflow="drop"``) and those that overflowed the capacity.
    """
    method = choose(options, mesh, x.shape[0])
    over = ("data",) if method == "replicated" else ("data", "expert")
    chunks = options.chunks if method in PLANS else 1
    padding = -x.shape[0] % (chunks * math.prod(mesh.shape[axis] for axis in over))
    rows_x, rows_routing = jax.tree.map(
        lambda a: jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)), (x, routing)
    )
    if method in PLANS:
        shard_fn = functools.partial(
            _capacity_shard,
            make_plan=PLANS[method],
            num_experts=weights.gate.shape[0],
            options=options,
            kernels=kernels,
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
        out_specs=Routed(rows, everywhere, everywhere),
    )(rows_x, rows_routing, weights)
    return routed._replace(y=routed.y[: x.shape[0]])
