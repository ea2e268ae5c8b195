"""Is it faster than what a user would pick instead: transformers, on the same weights?

Random Gaussian weights of one model, in both; distinct random tokens (equal rows would choose equal
experts); interleaved A B A B in one run. The peer's experts run in each of its implementations that
comes within twice its fastest in a short trial, and the fastest counts. The limits are measured in
the same run: reading memory for decode, one large product for prefill. Decode is greedy; prefill
gives the logits of the last position.

    python benchmarks/vs_transformers.py --plot docs/vs_transformers.svg
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _ours
import _peer
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from _common import environment, interleaved, report, run_script, spread
from _limits import matmul_flops, read_bandwidth

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.plots import figure_file

EXPERTS = ("eager", "grouped_mm", "batched_mm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Compares decode and prefill with transformers."""

    model: str = "bench"
    """bench (0.79 G parameters), small, or a preset."""
    layers: int | None = None
    """Fewer than the model's, to fit."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of weights and activations."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Rows decoded at once."""
    prompts: tuple[int, ...] = (128, 512, 2048)
    """Prompt lengths of prefill, one row."""
    context: int = 64
    """Prompt tokens before decoding."""
    steps: int = 64
    """Tokens decoded per row and repeat."""
    rounds: int = 5
    """Repeats of each, in turn."""
    plot: Path | None = None
    """Draw the ratios into this file."""
    quick: bool = False
    """Small sizes and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def small(options: Options) -> Options:
    """What ``--quick`` runs."""
    return dataclasses.replace(
        options,
        model="small",
        batches=(1, 3),
        prompts=(32,),
        context=8,
        steps=8,
        rounds=1,
    )


@dataclasses.dataclass(frozen=True)
class Pair:
    """Both models in one dtype."""

    config: ModelConfig
    ours: Mixtral
    theirs: Any
    dtype: str
    bandwidth: float
    flops: float


def decode_row(pair: Pair, batch: int, options: Options) -> dict[str, Any]:
    """Tokens per second of both, for ``batch`` rows."""
    prompts = _ours.random_prompts(pair.config, batch, options.context)
    calls = {"ours": _ours.decoder(pair.ours, prompts, options.steps)}
    trials = {name: _peer.decoder(pair.theirs, prompts, 4, name) for name in EXPERTS}
    took = {name: min(trial()[0] for _ in range(2)) for name, trial in trials.items()}
    for name in EXPERTS:
        if took[name] < 2 * min(took.values()):
            calls[name] = _peer.decoder(pair.theirs, prompts, options.steps, name)
    tokens = calls["ours"]()[1]
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for k in range(options.rounds):
        for name in list(calls)[:: 1 if k % 2 else -1]:
            seconds[name].append(calls[name]()[0] / options.steps)
    whole = np.concatenate([prompts, tokens], axis=1)
    hits = float(_ours.experts_hit(pair.ours, jnp.asarray(whole))[:, options.context :].mean())
    size = jnp.dtype(pair.dtype).itemsize
    context = options.context + options.steps / 2
    limit = _ours.step_bytes(pair.config, hits, batch, context, size) / pair.bandwidth
    return row_of("decode", pair, f"batch {batch}", seconds, batch, limit, {"experts hit": hits})


def prefill_row(pair: Pair, length: int, options: Options) -> dict[str, Any]:
    """Tokens per second of both, for one prompt."""
    prompt = _ours.random_prompts(pair.config, 1, length)
    calls: dict[str, Callable] = {"ours": lambda: _ours.read(pair.ours, prompt)}
    for name in EXPERTS[:2]:  # batched_mm copies the experts' weights for every token
        calls[name] = _peer.reader(pair.theirs, prompt, name)
    got, want = (np.asarray(calls[name](), np.float32) for name in ("ours", "eager"))
    apart = float(np.abs(got - want).max() / want.std())
    times = interleaved(list(calls.values()), options.rounds, f"prefill {length}")
    limit = _ours.prompt_flops(pair.config, length) / pair.flops
    what = f"{length} tokens"
    found = dict(zip(calls, times, strict=True))
    return row_of("prefill", pair, what, found, length, limit, {"logits apart": apart})


def row_of(
    what: str,
    pair: Pair,
    case: str,
    seconds: dict[str, list[float]],
    tokens: int,
    limit: float,
    more: dict[str, float],
) -> dict[str, Any]:
    """Medians, their ratio, and the share of the limit."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min((name for name in medians if name != "ours"), key=medians.__getitem__)
    return {
        "what": what,
        "dtype": pair.dtype,
        "case": case,
        "ours tok/s": round(tokens / medians["ours"], 1),
        "theirs tok/s": round(tokens / medians[best], 1),
        "their experts": best,
        "ratio": round(medians[best] / medians["ours"], 3),
        "share of limit": round(limit / medians["ours"], 3),
        "spread": spread(seconds["ours"]),
        "their spread": spread(seconds[best]),
        **{name: round(value, 4) for name, value in more.items()},
    }


def main(options: Options) -> int:
    """Runs and prints."""
    options = small(options) if options.quick else options
    config = _ours.config_of(options.model, options.layers)
    leaves = _peer.random_leaves(config)
    # Larger than any cache of a processor, whose speed would be no limit of memory.
    bandwidth = read_bandwidth(2**20 if options.quick else 2**28)
    rows, limits = [], {}
    for dtype in options.dtypes:
        limits[dtype] = {
            "read_bytes_per_second": bandwidth,
            "matmul_flops": matmul_flops(128 if options.quick else 2048, dtype),
        }
        pair = Pair(
            config,
            _peer.our_model(config, leaves, dtype),
            _peer.their_model(config, leaves, dtype),
            dtype,
            *limits[dtype].values(),
        )
        rows += [decode_row(pair, batch, options) for batch in options.batches]
        rows += [prefill_row(pair, length, options) for length in options.prompts]
        del pair
    if options.plot is not None:
        draw_ratios(rows, options.plot)
    asked = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("json", "plot")}
    peers = {"torch": torch.__version__, "transformers": transformers.__version__}
    for row in rows:  # one table for both
        row |= {name: row.get(name, "") for name in ("experts hit", "logits apart")}
    report(rows, is_json=options.json, **asked, limits=limits, peers=peers)
    return 0


def draw_ratios(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars: how many times as fast as the peer."""
    with figure_file(path, size=(8, 3.6)) as figure:
        _draw_bars(rows, figure.subplots())


def _draw_bars(rows: list[dict[str, Any]], axes: Any) -> None:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cases = list(dict.fromkeys((row["what"], row["case"]) for row in rows))
    width = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        found = {(r["what"], r["case"]): r["ratio"] for r in rows if r["dtype"] == dtype}
        at = [k + (i - (len(dtypes) - 1) / 2) * width for k in range(len(cases))]
        bars = axes.bar(at, [found[case] for case in cases], width, label=dtype)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cases)), [f"{what}\n{case}" for what, case in cases], fontsize=8)
    axes.set_ylabel("times as fast as transformers")
    axes.set_title(str(environment()["device"]), fontsize=9)
    axes.legend()


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
