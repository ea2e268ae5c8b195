"""How long does one expert layer take on a mesh, under every dispatch, and how far from its limit?

The yardstick is one dense product per device with the layer's FLOPs, in the same run: the time that
the layer would take if nothing travelled and its products were one large one. Runs on accelerators
where there are some, else on simulated devices (then it compares methods, no more). On one device
`lax.ragged_dot` on sorted rows is timed beside it, and experts whose rows the compiler knows.

    python benchmarks/moe_layer.py --mesh 1x8 --model mixtral-8x7b
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from _common import interleaved, report, run_script, spread
from _ours import config_of

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.table import KERNELS, Kernels, kernels_for
from mixtral_jax.model.placement import Routing
from mixtral_jax.model.router import route
from mixtral_jax.sharding.dispatch import DispatchOptions, dispatch
from mixtral_jax.sharding.mesh import MeshSpec, simulate_on_cpu
from mixtral_jax.sharding.rules import WEIGHT_RULES, partition_spec
from mixtral_jax.weights import ExpertSlots, Weight, expert_matrices

WARMED = 64  # rows from which on each call follows an untimed one of its own
METHODS = ("replicated", "gathered", "all_to_all", "all_to_all_once", "ragged")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times one expert layer."""

    mesh: str = "1x8"
    """data x expert, or data x expert x tensor."""
    model: str = "tiny"
    """For its sizes: bench, small, or a preset (tiny, mixtral-8x7b, mixtral-8x22b)."""
    rows: tuple[int, ...] = (16, 512, 4096)
    """Tokens over all devices."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of weights and rows."""
    capacity_factor: float = 2.0
    """Of the methods with a capacity."""
    rounds: int = 9
    """Timed runs of each method, in turn."""
    quick: bool = False
    """One size and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""
    debug: bool = False
    """Show tracebacks."""


def kernels_of(mesh: jax.sharding.Mesh) -> str:
    """The row of the kernels table that ``load`` chooses for these devices."""
    return kernels_for(mesh.devices.flat[0].platform)


def random_experts(config: ModelConfig, mesh: jax.sharding.Mesh, dtype: Any) -> ExpertWeights:
    """Gaussian experts, born on their devices, as ``load`` lays them out there."""
    E, F, D = config.num_local_experts, config.intermediate_size, config.hidden_size
    is_slots = KERNELS[kernels_of(mesh)].layout == "slots"
    count = mesh.shape["expert"] if is_slots else E  # experts of one array

    def leaf(axes: tuple[str, ...], O: int, I: int, seed: int) -> Weight:  # noqa: E741
        sharding = jax.NamedSharding(mesh, partition_spec(axes, WEIGHT_RULES))
        draw = jax.jit(
            lambda key: (jax.random.normal(key, (count, O, I)) / math.sqrt(I)).astype(dtype),
            out_shardings=sharding,
        )
        keys = jax.random.split(jax.random.key(seed), E // count)
        arrays = tuple(draw(key) for key in keys)
        return ExpertSlots(arrays) if is_slots else arrays[0]

    into, back = ("expert", "mlp", "embed"), ("expert", "embed", "mlp")
    return ExpertWeights(leaf(into, F, D, 1), leaf(into, F, D, 2), leaf(back, D, F, 3))


def yardsticks(
    config: ModelConfig, mesh: jax.sharding.Mesh, rows: int, dtype: Any
) -> dict[str, Callable]:
    """One product per device with the FLOPs that the layer needs there, either operand first.

    "narrow" sums over the wide dim and so writes a result of a layer's size; of the other a large
    part may go into the memory of its result.
    """
    D, F, A = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    devices = mesh.size
    n = max(1, rows * A // devices)
    spec = jax.P(("data", "expert", "tensor"))

    def product(einsum: str, x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum(
            einsum, *((x, w) if einsum[0] == "N" else (w, x)), preferred_element_type=jnp.float32
        )

    found = {}
    for kind, out, summed in (("wide", 3 * F, D), ("narrow", D, 3 * F)):
        x = jnp.ones((devices * n, summed), dtype)
        w = jnp.ones((devices * out, summed), dtype)
        x, w = (jax.device_put(a, jax.NamedSharding(mesh, spec)) for a in (x, w))
        for order, einsum in {"rows first": "NI,OI->NO", "weight first": "OI,NI->ON"}.items():
            run = jax.shard_map(
                functools.partial(product, einsum),
                mesh=mesh,
                in_specs=(spec, spec),
                out_specs=spec,
            )
            found[f"one product, {kind}, {order}"] = functools.partial(jax.jit(run), x, w)
    return found


def stacked(weights: ExpertWeights) -> list[jax.Array]:
    """Of one device: ``[E, I, O]``, as ragged_dot takes them."""
    stacks = (jnp.concatenate(w.slots) if isinstance(w, ExpertSlots) else w for w in weights)
    return [jnp.asarray(stack).swapaxes(1, 2) for stack in stacks]


@jax.jit
def ragged(x: jax.Array, routing: Routing, weights: list[jax.Array]) -> jax.Array:
    """The layer with ``lax.ragged_dot`` on rows sorted by expert, as its documentation has it."""
    gate, up, down = weights
    ids = routing.expert_ids.reshape(-1)
    order = jnp.argsort(ids)
    sizes = jnp.bincount(ids, length=gate.shape[0]).astype(jnp.int32)
    rows = order // routing.expert_ids.shape[1]

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)

    hidden = jax.nn.silu(product(x[rows], gate)) * product(x[rows], up)
    done = product(hidden.astype(x.dtype), down) * routing.expert_weights.reshape(-1)[order, None]
    return jnp.zeros(x.shape, jnp.float32).at[rows].add(done)


def known_routing(
    x: jax.Array, routing: Routing, weights: ExpertWeights, kernels: Kernels
) -> Callable[[], list[jax.Array]]:
    """Each expert on exactly its rows, which are known when it is compiled and sorted beforehand.

    The layer without what routing costs: no sorting, no branches, no padding, no SiLU and no sum.
    """
    ids = np.asarray(routing.expert_ids)
    ends = np.cumsum(np.bincount(ids.reshape(-1), minlength=weights.gate.shape[0]))
    chosen = x[np.argsort(ids.reshape(-1), kind="stable") // ids.shape[1]]
    product = functools.partial(kernels.contract, "NI,OI->NO", dtype=jnp.float32)

    @jax.jit
    def run(chosen: jax.Array, weights: ExpertWeights) -> list[jax.Array]:
        outs = []
        for e, (gate, up, down) in enumerate(zip(*map(expert_matrices, weights), strict=True)):
            rows = chosen[ends[e - 1] if e else 0 : ends[e]]
            if rows.shape[0]:
                hidden = product(rows, gate) * product(rows, up)
                outs.append(product(hidden.astype(x.dtype), down))
        return outs

    return functools.partial(run, chosen, weights)


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per number of tokens and method."""
    config = config_of(options.model)
    spec = MeshSpec.parse(options.mesh).fit(config)
    simulate_on_cpu(spec, lambda line: print(f"note: {line}", file=sys.stderr))
    mesh, dtype = spec.build(), jnp.dtype(options.dtype)
    weights, rows = random_experts(config, mesh, dtype), []
    E, A, D, F = (
        config.num_local_experts,
        config.num_experts_per_tok,
        config.hidden_size,
        config.intermediate_size,
    )
    for count in options.rows[:1] if options.quick else options.rows:
        key_x, key_r = jax.random.split(jax.random.key(count))
        x = jax.random.normal(key_x, (count, D)).astype(dtype)
        routing = route(jax.random.normal(key_r, (count, E)), jnp.ones((count,), bool), top_k=A)
        calls = yardsticks(config, mesh, count, dtype)
        facts: dict[str, tuple[int, int]] = {}
        if mesh.size == 1:
            calls["ragged_dot"] = functools.partial(ragged, x, routing, stacked(weights))
            kernels = KERNELS[kernels_of(mesh)]
            calls["known routing"] = known_routing(x, routing, weights, kernels)
        for method in METHODS if mesh.size > 1 else METHODS[:1]:
            asked = DispatchOptions(method=method, capacity_factor=options.capacity_factor)  # type: ignore[arg-type]
            kernels = KERNELS[kernels_of(mesh)]
            run = jax.jit(functools.partial(dispatch, mesh=mesh, options=asked, kernels=kernels))
            call = functools.partial(run, x, routing, weights)
            facts[method] = int(call().dropped), int(call().overflowed)
            calls[method] = call
        rows += timed(calls, facts, options, count, 6 * count * A * D * F / mesh.size)
    return rows


def timed(
    calls: dict[str, Callable],
    facts: dict[str, tuple[int, int]],
    options: Options,
    count: int,
    flops: float,
) -> list[dict[str, Any]]:
    """Interleaved medians, and the share of the faster yardstick."""
    for call in calls.values():
        jax.block_until_ready(call())
    rounds = 1 if options.quick else options.rounds
    # In a model a layer follows another of its kind, and not a yardstick. Few rows are bound by
    # reading weights, of which a call right before would leave some in the processor's cache.
    is_warmed = count >= WARMED
    seconds = interleaved(list(calls.values()), rounds, f"{count} rows", is_warmed=is_warmed)
    times = dict(zip(calls, seconds, strict=True))
    dense = min(statistics.median(times[name]) for name in times if name.startswith("one product"))
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append(
            {
                "tokens": count,
                "method": name,
                "ms": round(1e3 * median, 3),
                "spread": spread(seconds),
                "GFLOP/s per device": round(flops / median / 1e9, 1),
                "share of one product": round(dense / median, 3),
                "overflowed": facts.get(name, (0, 0))[1],
            }
        )
    return rows


def main(options: Options) -> int:
    """Runs and prints."""
    rows = measure(options)
    asked = dataclasses.asdict(options)
    asked["tokens"] = asked.pop("rows")
    report(rows, is_json=options.json, **asked)
    return 0 if all(np.isfinite(row["ms"]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
