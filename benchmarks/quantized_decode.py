"""How fast do quantized weights decode, beside 16 bits?

The same Gaussian weights, quantized as ``--quantize`` does; distinct random prompts; greedy; every
scheme in turn with bf16 in one run.

    python benchmarks/quantized_decode.py --schemes int8 int4 nf4 --batches 1
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from typing import Any

import _ours
import jax
from _common import report, run_script, spread


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Decodes with quantized weights and compares with the plain ones."""

    model: str = "bench"
    """bench (0.79 G parameters), small, or a preset."""
    layers: int | None = None
    """Fewer than the model's, to fit."""
    dtype: str = "bfloat16"
    """Of activations and plain weights."""
    schemes: tuple[str, ...] = ("int8",)
    """int8, fp8, int4, nf4, fp4."""
    batches: tuple[int, ...] = (1, 8)
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
    """One row per batch and scheme."""
    config = _ours.config_of(options.model, options.layers)
    names = (None, *options.schemes)
    models = {name: _ours.random_model(config, options.dtype, name) for name in names}
    rows = []
    for batch in options.batches:
        prompts = _ours.random_prompts(config, batch, options.context)
        calls = {n: _ours.decoder(model, prompts, options.steps) for n, model in models.items()}
        for call in calls.values():
            call()
        seconds: dict[str | None, list[float]] = {name: [] for name in names}
        for k in range(options.rounds):
            for name in names[:: 1 if k % 2 else -1]:
                seconds[name].append(calls[name]()[0] / options.steps)
        plain = statistics.median(seconds[None])
        for name, times in seconds.items():
            median = statistics.median(times)
            rows.append(
                {
                    "batch": batch,
                    "weights": name or options.dtype,
                    "GB": round(sum(x.nbytes for x in jax.tree.leaves(models[name])) / 1e9, 3),
                    "tok/s": round(batch / median, 1),
                    "ms per step": round(1e3 * median, 2),
                    "speed-up": round(plain / median, 3),
                    "spread": spread(times),
                }
            )
    return rows


def main(options: Options) -> int:
    """Runs and prints."""
    if options.quick:
        options = dataclasses.replace(
            options, model="small", batches=(1,), context=8, steps=8, rounds=1
        )
    report(measure(options), is_json=options.json, **dataclasses.asdict(options))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
