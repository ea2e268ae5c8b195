"""How fast are the collectives that the dispatch uses, by size, on this host?

Bus bandwidth as NCCL's tests define it: bytes that a device must send over the time. Runs on
accelerators where there are some; on simulated devices it measures copies in memory.

    python benchmarks/collectives.py --mesh 1x8
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _common import interleaved, report, run_script, spread

from mixtral_jax.sharding.collectives import Collective
from mixtral_jax.sharding.mesh import AXES, MeshSpec, simulate_on_cpu

WIDTH = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times collectives over the expert axis."""

    mesh: str = "1x8"
    """data x expert, or data x expert x tensor."""
    kib: tuple[int, ...] = (64, 1024, 16384)
    """Size of one device's buffer."""
    rounds: int = 15
    """Timed runs of each, in turn."""
    quick: bool = False
    """One size and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""
    debug: bool = False
    """Show tracebacks."""


def operations(shards: int) -> dict[str, tuple[Callable, int]]:
    """Each operation, and the group's result as a multiple of one device's buffer."""
    over = functools.partial
    return {
        "all-to-all": (over(jax.lax.all_to_all, axis_name="expert", split_axis=0, concat_axis=0,
                            tiled=True), 1),
        "all-gather": (over(jax.lax.all_gather, axis_name="expert", tiled=True), shards),
        "reduce-scatter": (over(jax.lax.psum_scatter, axis_name="expert", tiled=True), 1),
        "all-reduce": (over(jax.lax.psum, axis_name="expert"), 1),
    }  # fmt: skip


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per size and operation."""
    spec = MeshSpec.parse(options.mesh)
    simulate_on_cpu(spec, lambda line: print(f"note: {line}", file=sys.stderr))
    mesh, rows = spec.build(), []
    everywhere = jax.P(AXES)
    for kib in options.kib[:1] if options.quick else options.kib:
        n = max(1, kib * 1024 // (WIDTH * 2 * spec.expert)) * spec.expert
        shape = (n * spec.num_devices, WIDTH)
        x = jax.device_put(jnp.ones(shape, jnp.bfloat16), jax.NamedSharding(mesh, everywhere))
        calls, sizes = {}, {}
        for name, (operation, factor) in operations(spec.expert).items():
            run = jax.jit(
                jax.shard_map(
                    operation,
                    mesh=mesh,
                    in_specs=everywhere,
                    out_specs=everywhere,
                )
            )
            calls[name] = functools.partial(run, x)
            sizes[name] = Collective(name, factor * n * WIDTH * 2, *spec.group("expert")).wire_bytes
            jax.block_until_ready(calls[name]())
        rounds = 1 if options.quick else options.rounds
        times = dict(
            zip(calls, interleaved(list(calls.values()), rounds, f"{kib} KiB"), strict=True)
        )
        for name, seconds in times.items():
            median = statistics.median(seconds)
            rows.append(
                {
                    "operation": name,
                    "KiB per device": n * WIDTH * 2 // 1024,
                    "us": round(1e6 * median, 1),
                    "spread": spread(seconds),
                    "bus GB/s": round(sizes[name] / median / 1e9, 3),
                }
            )
    return rows


def main(options: Options) -> int:
    """Runs and prints."""
    report(measure(options), is_json=options.json, mesh=options.mesh, dtype="bfloat16")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
