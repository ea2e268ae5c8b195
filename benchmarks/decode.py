"""How fast does decoding go, and how far is it from the machine's read bandwidth?

Random Gaussian weights, drawn on the device; distinct random prompts; greedy. The limit is the time
to read the bytes of a step (weights of the experts hit, the rest, the cache in use) at the
bandwidth measured in the same run.

    python benchmarks/decode.py --model mixtral-8x7b --dtype bfloat16 --batches 1 8 32

With ``--schemes`` the same weights, quantized as ``--quantize`` does, run in turn with the plain
ones, whose speed theirs is compared with:

    python benchmarks/decode.py --schemes int8 int4 nf4 --batches 1
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from typing import Any

import _ours
import jax
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
    """Of activations and plain weights."""
    schemes: tuple[str, ...] = ()
    """int8, fp8, int4, nf4, fp4: beside the plain weights."""
    plain: bool = True
    """Also the plain weights (where they do not fit beside the others, --no-plain)."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Rows decoded at once."""
    context: int = 64
    """Prompt tokens before decoding."""
    steps: int = 64
    """Tokens decoded per row and repeat."""
    rounds: int = 5
    """Repeats of each, in turn; the median counts."""
    quick: bool = False
    """The small model and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per batch and kind of weights."""
    config = _ours.config_of(options.model, options.layers)
    size = jnp.dtype(options.dtype).itemsize
    bandwidth = read_bandwidth(2**20 if options.quick else 2**28)
    names: list[str | None] = [None] * options.plain + list(options.schemes)
    models = {name: _ours.random_model(config, options.dtype, name) for name in names}
    rows = []
    for batch in options.batches:
        prompts = _ours.random_prompts(config, batch, options.context)
        calls = {n: _ours.decoder(model, prompts, options.steps) for n, model in models.items()}
        tokens = next(iter([call()[1] for call in calls.values()]))
        times: dict[str | None, list[float]] = {name: [] for name in names}
        for k in range(options.rounds):
            for name in names[:: 1 if k % 2 else -1]:
                times[name].append(calls[name]()[0] / options.steps)
        # In the first weights alone: codes choose much the same, and compile slowly here.
        whole = jnp.asarray(np.concatenate([prompts, tokens], axis=1))
        hits = float(_ours.experts_hit(models[names[0]], whole)[:, options.context :].mean())
        for name, model in models.items():
            seconds = statistics.median(times[name])
            context = options.context + options.steps / 2
            read = _ours.read_bytes(model, hits) + _ours.cache_bytes(config, batch, context, size)
            rows.append(
                {
                    "batch": batch,
                    "weights": name or options.dtype,
                    "tok/s": round(batch / seconds, 1),
                    "ms per step": round(1e3 * seconds, 2),
                    "speed-up": speed_up(times[None], times[name]) if options.plain else None,
                    "GB/s": round(read / seconds / 1e9, 2),
                    "share of limit": round(read / bandwidth / seconds, 3),
                    "experts hit": round(hits, 2),
                    "spread": spread(times[name]),
                    "GB": round(sum(x.nbytes for x in jax.tree.leaves(model)) / 1e9, 3),
                    "limit GB/s": round(bandwidth / 1e9, 1),
                }
            )
    return rows


def speed_up(plain: list[float], other: list[float]) -> float:
    """The median of the ratios of each turn."""
    return round(statistics.median(a / b for a, b in zip(plain, other, strict=True)), 3)


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
