"""What does the capacity factor cost, and what does it lose? The embedded model, simulated mesh.

Reads one batch of held-out questions and answers, teacher-forced, under factors from 0.5 to 4,
exact and dropping: share of assignments that overflow and that are dropped, bytes that a device
sends, time (interleaved; of simulated devices: it shows the fallback, not a network), and how far
the output is from the dropless one. ``--plot`` draws it (needs the plots extra).

    python benchmarks/capacity_factor.py --plot docs/capacity_factor.svg
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _common import interleaved, run_script, spread
from convert_memory import environment
from rich.console import Console
from rich.progress import track
from rich.table import Table

import mixtral_jax as mj
from mixtral_jax.model.placement import Placement
from mixtral_jax.model.stats import router_stats
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.sharding.dispatch import DispatchOptions, Overflow
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.traffic import Pass, forward_traffic

sys.path.insert(0, str(Path(__file__).parents[1]))  # examples/ is no installed package
from examples.tiny.text import held_out

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
OVERFLOWS: tuple[Overflow, ...] = ("exact", "drop")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Sweeps the capacity factor."""

    mesh: str = "1x8"
    """data x expert; one batch row per device at least."""
    rows: int = 64
    """Rows of the batch."""
    length: int = 48
    """Tokens of each."""
    rounds: int = 7
    """Timed runs of each setting, in turn."""
    plot: Path | None = None
    """Draw the picture there."""
    quick: bool = False
    """Two factors and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""
    debug: bool = False
    """Show tracebacks."""


def batch_of(lm: mj.LanguageModel, rows: int, length: int) -> np.ndarray:
    """Held-out questions and their answers, one after the other: ids ``[rows, length]``."""
    examples = held_out(-(-rows * length // 100), seed=0)
    random.Random(0).shuffle(examples)
    ids = [i for each in examples for i in lm.encode(f"{each.prompt} {each.answer}")]
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


@functools.partial(jax.jit, static_argnames=("placement",))
def run(model: Mixtral, tokens: jax.Array, *, placement: Placement) -> Any:
    """Log-probabilities and router statistics of one pass."""
    hidden = model.hidden(tokens, placement=placement)
    return jax.nn.log_softmax(model.unembed(hidden.x, placement)), router_stats(hidden)


def sent_bytes(lm: mj.LanguageModel, options: DispatchOptions, shape: tuple[int, int]) -> float:
    """Bytes that one device sends in the expert layers of one pass, were they on a network."""
    placement = lm.placement
    assert isinstance(placement, MeshPlacement)
    work = Pass(
        config=lm.config,
        mesh=lm.spec,
        strategy=placement.strategy,
        options=options,
        batch=shape[0],
        length=shape[1],
        itemsize=4,
    )
    found = forward_traffic(work)
    return sum(each.wire_bytes for each in found) / lm.config.num_hidden_layers


def measure(lm: mj.LanguageModel, options: Options) -> list[dict[str, Any]]:
    """One row per factor and overflow."""
    placement = lm.placement
    assert isinstance(placement, MeshPlacement)
    tokens = jnp.asarray(batch_of(lm, options.rows, options.length))
    gathered = DispatchOptions(method="gathered")
    exact, _ = run(lm.model, tokens, placement=dataclasses.replace(placement, dispatch=gathered))
    factors = FACTORS[::5] if options.quick else FACTORS
    settings = [
        DispatchOptions(method="all_to_all", capacity_factor=factor, overflow=overflow)
        for overflow in OVERFLOWS
        for factor in factors
    ]
    calls, rows = [], []
    shape = (options.rows, options.length)
    for setting in track(settings, "compiling", console=Console(stderr=True), transient=True):
        here = dataclasses.replace(placement, dispatch=setting)
        call = functools.partial(run, lm.model, tokens, placement=here)
        logs, stats = jax.device_get(call())
        divergence = (jnp.exp(exact) * (exact - logs)).sum(axis=-1)
        overflowed = np.asarray(stats.overflow_rate)
        # Under "exact" a layer that overflows is gathered, instead of what is common.
        fallback = float((overflowed > 0).mean()) if setting.overflow == "exact" else 0.0
        common, instead = (sent_bytes(lm, each, shape) for each in (setting, gathered))
        calls.append(call)
        rows.append(
            {
                "capacity factor": setting.capacity_factor,
                "overflow": setting.overflow,
                "overflow rate": float(overflowed.mean()),
                "drop rate": float(np.asarray(stats.drop_rate).mean()),
                "layers gathered": fallback,
                "sent bytes per layer": round((1 - fallback) * common + fallback * instead),
                "mean KL": max(0.0, float(divergence.mean())),
                "same best token": float((logs.argmax(-1) == exact.argmax(-1)).mean()),
            }
        )
    times = interleaved(calls, 1 if options.quick else options.rounds, "timing")
    for row, seconds in zip(rows, times, strict=True):
        row["milliseconds"] = round(1e3 * statistics.median(seconds), 2)
        row["spread"] = spread(seconds)
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Five small panels over the capacity factor."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams |= {"svg.hashsalt": "mixtral_jax", "svg.fonttype": "none"}
    panels = {
        "overflow rate": "assignments that overflow",
        "drop rate": "assignments dropped",
        "sent bytes per layer": "bytes that a device sends, per layer",
        "milliseconds": "ms per pass (simulated devices)",
        "mean KL": "mean KL from the dropless output",
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.4))
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for overflow, style in zip(OVERFLOWS, ("o-", "s--"), strict=True):
            chosen = [row for row in rows if row["overflow"] == overflow]
            axis.plot(
                [row["capacity factor"] for row in chosen],
                [row[column] for row in chosen],
                style,
                label=overflow,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("capacity factor")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(options: Options) -> int:
    """Runs, prints, draws."""
    lm = mj.load("tiny", mesh=options.mesh)
    rows = measure(lm, options)
    result = {
        "command": f"python benchmarks/capacity_factor.py {' '.join(sys.argv[1:])}".strip(),
        "mesh": options.mesh,
        "batch": [options.rows, options.length],
        "dtype": "float32",
        "rows": rows,
        **environment(),
    }
    if options.plot is not None:
        draw(rows, options.plot)
    if not options.json:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        Console(stderr=True).print(table)
    print(json.dumps(result))
    kept = [row for row in rows if row["overflow"] == "exact"]
    return 0 if all(row["mean KL"] < 1e-6 and row["drop rate"] == 0 for row in kept) else 1


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
