"""transformers alone on this machine's device: what benchmarks/in_turns.py sets beside ours.

Gaussian weights drawn on the device. The faster of its implementations of the experts counts.

    python benchmarks/peer_alone.py --model mixtral-8x7b --json
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import _ours
import _peer
import torch
from _common import Cases, report, run_script

EXPERTS = ("eager", "grouped_mm", "batched_mm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Cases):
    """Times transformers."""

    context: int = 64
    """Prompt tokens before decoding."""
    steps: int = 64
    """Tokens decoded per row and repeat."""
    rounds: int = 3
    """Repeats; the median counts."""
    quick: bool = False
    """The small model and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def fastest(calls: dict[str, Callable[[], float]], rounds: int) -> tuple[str, float]:
    """Name and median seconds of the fastest, after one call to warm each up."""
    medians = {}
    for name, call in calls.items():
        call()
        medians[name] = statistics.median(call() for _ in range(rounds))
    return min(medians.items(), key=lambda pair: pair[1])


def timed(call: Callable[[], Any]) -> Callable[[], float]:
    """Wall seconds of a call that ends with a read by the host."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return run


def measure(options: Options) -> list[dict[str, Any]]:
    """A row per batch decoded and per prompt read."""
    config = _ours.config_of(options.model, options.layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, rows = _peer.random_on(config, options.dtype, device), []
    for batch in options.batches:
        prompts = _ours.random_prompts(config, batch, options.context)
        calls = {}
        for name in EXPERTS:
            run = _peer.decoder(model, prompts, options.steps, name)
            calls[name] = lambda run=run: run()[0] / options.steps
        name, seconds = fastest(calls, options.rounds)
        rows.append({"what": "decode", "case": batch, "tok/s": batch / seconds, "experts": name})
    for length in options.lengths:
        prompt = _ours.random_prompts(config, 1, length)
        # batched_mm copies the experts' weights for every token
        calls = {name: timed(_peer.reader(model, prompt, name)) for name in EXPERTS[:2]}
        name, seconds = fastest(calls, options.rounds)
        rows.append({"what": "prefill", "case": length, "tok/s": length / seconds, "experts": name})
    return rows


def main(options: Options) -> int:
    """Runs and prints."""
    if options.quick:
        options = dataclasses.replace(
            options, model="small", batches=(1,), lengths=(32,), context=8, steps=4, rounds=1
        )
    report(measure(options), is_json=options.json, **dataclasses.asdict(options))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
