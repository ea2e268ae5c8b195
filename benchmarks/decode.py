"""How fast does decoding go, and how far is it from the machine's read bandwidth?

Random Gaussian weights, drawn on the device; distinct random prompts; greedy. The limit is the time
to read the bytes of a step (weights of the experts hit, the rest, the cache in use) at the
bandwidth measured in the same run.

    python benchmarks/decode.py --model mixtral-8x7b --dtype bfloat16 --batches 1 8 32
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from typing import Any

import _ours
import jax.numpy as jnp
import numpy as np
from _common import report, run_script, spread
from _limits import read_bandwidth


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Decodes batches and compares with the read bandwidth."""

    model: str = "bench"
    """bench (0.79 G parameters), small, or a preset: mixtral-8x7b, mixtral-8x22b, tiny."""
    layers: int | None = None
    """Fewer than the model's, to fit."""
    dtype: str = "bfloat16"
    """Of weights and activations."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Rows decoded at once."""
    context: int = 64
    """Prompt tokens before decoding."""
    steps: int = 64
    """Tokens decoded per row and repeat."""
    rounds: int = 5
    """Repeats; the median counts."""
    quick: bool = False
    """The small model and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per batch."""
    config = _ours.config_of(options.model, options.layers)
    size = jnp.dtype(options.dtype).itemsize
    bandwidth = read_bandwidth(2**20 if options.quick else 2**28)
    model, rows = _ours.random_model(config, options.dtype), []
    for batch in options.batches:
        prompts = _ours.random_prompts(config, batch, options.context)
        call = _ours.decoder(model, prompts, options.steps)
        tokens = call()[1]
        times = [call()[0] / options.steps for _ in range(options.rounds)]
        seconds = statistics.median(times)
        whole = jnp.asarray(np.concatenate([prompts, tokens], axis=1))
        hits = float(_ours.experts_hit(model, whole)[:, options.context :].mean())
        context = options.context + options.steps / 2
        read = _ours.step_bytes(config, hits, batch, context, size)
        rows.append(
            {
                "batch": batch,
                "tok/s": round(batch / seconds, 1),
                "ms per step": round(1e3 * seconds, 2),
                "GB/s": round(read / seconds / 1e9, 2),
                "share of limit": round(read / bandwidth / seconds, 3),
                "experts hit": round(hits, 2),
                "spread": spread(times),
                "limit GB/s": round(bandwidth / 1e9, 1),
            }
        )
    return rows


def main(options: Options) -> int:
    """Runs and prints."""
    if options.quick:
        options = dataclasses.replace(
            options, model="small", batches=(1, 3), context=8, steps=8, rounds=1
        )
    asked = dataclasses.asdict(options)
    report(measure(options), is_json=options.json, **asked)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
