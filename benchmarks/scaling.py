"""What do more devices bring? One forward pass with the same rows per device, mesh after mesh.

Weights are random, born on their devices, of a preset's sizes with fewer layers where asked. On
simulated devices all meshes share the same cores, so perfect scaling is the same tokens/s.

    python benchmarks/scaling.py --model mixtral-8x7b --meshes 1x1 1x2 1x4 1x8 --layers 2
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import sys
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from _common import interleaved, report, run_script, spread

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Mixtral, assemble, leaf_specs
from mixtral_jax.sharding.dispatch import DispatchOptions, Method
from mixtral_jax.sharding.mesh import MeshSpec, simulate_on_cpu
from mixtral_jax.sharding.place import weight_shardings
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.report import find_config
from mixtral_jax.sharding.traffic import Pass, forward_traffic
from mixtral_jax.weights import ExpertSlots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times one forward pass on several meshes."""

    model: str = "tiny"
    """A preset, for its sizes."""
    meshes: tuple[str, ...] = ("1x1", "1x2", "1x4", "1x8")
    """Smallest first; efficiency is against the first."""
    layers: int | None = None
    """So many layers only."""
    rows: int = 4
    """Batch rows per device."""
    length: int = 128
    """Tokens per row."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of weights and activations."""
    dispatch: Method = "auto"
    """How rows travel."""
    rounds: int = 7
    """Timed runs of each mesh, in turn."""
    quick: bool = False
    """Two meshes and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""
    debug: bool = False
    """Show tracebacks."""


def random_model(config: ModelConfig, mesh: jax.sharding.Mesh, dtype: str) -> Mixtral:
    """Gaussian weights, born where they lie; experts as whole arrays."""
    specs, leaves = leaf_specs(config, dtype), {}
    shardings, shards = weight_shardings(specs, mesh), mesh.shape["expert"]
    for k, (path, spec) in enumerate(specs.items()):

        def draw(key: jax.Array, shape: tuple[int, ...], where: Any, spec: Any = spec) -> jax.Array:
            make = jax.jit(
                lambda key: (0.02 * jax.random.normal(key, shape)).astype(spec.dtype),
                out_shardings=where,
            )
            return make(key) if len(shape) > 1 else make(key) + 1

        keys = jax.random.split(jax.random.key(k), spec.shape[0] // shards or 1)
        if "expert" in spec.axes:
            shape = (shards, *spec.shape[1:])
            leaves[path] = ExpertSlots(tuple(draw(key, shape, shardings[path]) for key in keys))
        else:
            leaves[path] = draw(keys[0], spec.shape, shardings[path])
    return assemble(config, leaves)


@functools.partial(jax.jit, static_argnames=("placement",))
def forward(model: Mixtral, tokens: jax.Array, *, placement: MeshPlacement) -> jax.Array:
    """The last position's logits."""
    return model.unembed(model.hidden(tokens, placement=placement).x[:, -1], placement)


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per mesh."""
    config = find_config(options.model)
    if options.layers is not None:
        config = dataclasses.replace(config, num_hidden_layers=options.layers)
    names = options.meshes[:2] if options.quick else options.meshes
    specs = [MeshSpec.parse(name).fit(config) for name in names]
    largest = max(specs, key=lambda spec: spec.num_devices)
    simulate_on_cpu(largest, lambda line: print(f"note: {line}", file=sys.stderr))
    dispatch = DispatchOptions(method=options.dispatch)
    calls, rows = [], []
    for spec in specs:
        mesh, batch = spec.build(), options.rows * spec.num_devices
        placement = MeshPlacement(mesh, dispatch)
        draw = np.random.default_rng(0)
        tokens = draw.integers(0, config.vocab_size, (batch, options.length)).astype(np.int32)
        model = random_model(config, mesh, options.dtype)
        calls.append(functools.partial(forward, model, tokens, placement=placement))
        jax.block_until_ready(calls[-1]())
        work = Pass(
            config=config,
            mesh=spec,
            strategy=placement.strategy,
            options=dispatch,
            batch=batch,
            length=options.length,
            itemsize=jnp.dtype(options.dtype).itemsize,
        )
        sent = round(sum(each.wire_bytes for each in forward_traffic(work)))
        rows.append({"mesh": str(spec), "tokens": batch * options.length, "sent bytes": sent})
    times = interleaved(calls, 1 if options.quick else options.rounds, "timing")
    for row, seconds, spec in zip(rows, times, specs, strict=True):
        median = statistics.median(seconds)
        row["ms"] = round(1e3 * median, 2)
        row["spread"] = spread(seconds)
        row["tokens/s"] = round(row["tokens"] / median)
        row["tokens/s per device"] = round(row["tokens"] / median / spec.num_devices)
        first = rows[0]["tokens/s per device"]
        row["efficiency"] = round(row["tokens/s per device"] / first, 3)
    return rows


def main(options: Options) -> int:
    """Runs and prints."""
    report(
        measure(options),
        is_json=options.json,
        **{"rows per device": options.rows, "length": options.length, "dtype": options.dtype},
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
