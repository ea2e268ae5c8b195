"""How fast are prompts read, how far from the machine's products, and with what memory?

Random Gaussian weights, drawn on the device; one row of random tokens, read in chunks into the
cache as ``sample`` reads it. The limit is the time of the prompt's FLOPs at the rate of one large
product, measured in the same run.

    python benchmarks/prefill.py --model mixtral-8x7b --layers 2 --dtype bfloat16 --lengths 32768
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import sys
from typing import Any

import _ours
import jax
from _common import report, run_script, spread
from _limits import matmul_flops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Reads prompts and compares with the rate of one large product."""

    model: str = "bench"
    """bench (0.79 G parameters), small, or a preset: mixtral-8x7b, mixtral-8x22b, tiny."""
    layers: int | None = None
    """Fewer than the model's, to fit."""
    dtype: str = "bfloat16"
    """Of weights and activations."""
    lengths: tuple[int, ...] = (128, 512, 2048)
    """Tokens of the prompt."""
    rounds: int = 5
    """Repeats; the median counts."""
    quick: bool = False
    """The small model and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def peak_bytes() -> int:
    """Of the device where it counts, else the resident set of this process; so far."""
    stats = jax.local_devices()[0].memory_stats() or {}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(stats.get("peak_bytes_in_use", resident))


def measure(options: Options) -> list[dict[str, Any]]:
    """One row per length."""
    config = _ours.config_of(options.model, options.layers)
    # The last token is read by a step of decoding, which writes another.
    longest = max(config.max_position_embeddings, max(options.lengths) + 2)
    config = dataclasses.replace(config, max_position_embeddings=longest)
    flops = matmul_flops(256 if options.quick else 2048, options.dtype)
    model, rows = _ours.random_model(config, options.dtype), []
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    for length in options.lengths:
        prompts, times = _ours.random_prompts(config, 1, length + 1), []
        for _ in range(options.rounds + 1):  # the first compiles
            run = _ours.generation(model, prompts, 1)
            list(run.chunks())
            times.append(run.progress.prefill_seconds)
        seconds = statistics.median(times[1:])
        work = _ours.prompt_flops(config, length)
        rows.append(
            {
                "tokens": length,
                "tok/s": round(length / seconds, 1),
                "seconds": round(seconds, 3),
                "GFLOP/s": round(work / seconds / 1e9, 1),
                "share of limit": round(work / flops / seconds, 3),
                "spread": spread(times[1:]),
                "limit GFLOP/s": round(flops / 1e9, 1),
                "weights MB": round(weights / 1e6),
                "peak MB so far": round(peak_bytes() / 1e6),
            }
        )
    return rows


def main(options: Options) -> int:
    """Runs and prints."""
    if options.quick:
        options = dataclasses.replace(options, model="small", lengths=(32, 600), rounds=1)
    report(measure(options), is_json=options.json, **dataclasses.asdict(options))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
