"""What the benchmarks share: calls timed in turn, one JSON line beside a table, and errors."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from convert_memory import environment
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mixtral_jax import cli


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cases:
    """A model, and what is decoded and read with it: of ours and of transformers alike."""

    model: str = "bench"
    """bench (0.79 G parameters), small, or a preset."""
    layers: int | None = None
    """Fewer than the model's, to fit."""
    dtype: str = "bfloat16"
    """Of weights and activations."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Rows decoded at once."""
    lengths: tuple[int, ...] = (128, 512, 2048)
    """Tokens of the prompts read."""


def run_script(main: Callable[[Any], int], options_type: type) -> int:
    """Runs a benchmark with the one-line errors and exit codes of the commands.

    A sequence is one option with several values (``--rows 16 512``).
    """
    return cli.run(main, options_type, f"python benchmarks/{Path(sys.argv[0]).name}", markers=())


def interleaved(
    calls: Sequence[Callable[[], Any]], rounds: int, what: str, *, is_warmed: bool = False
) -> list[list[float]]:
    """Seconds of each call in each round; every other round in reverse order.

    With ``is_warmed`` each follows an untimed call of itself, so that what one leaves behind in
    caches and in the allocator is not charged to the next.
    """
    times: list[list[float]] = [[] for _ in calls]
    for k in track(range(rounds), what, console=Console(stderr=True), transient=True):
        for i in range(len(calls))[:: 1 if k % 2 else -1]:
            if is_warmed:
                jax.block_until_ready(calls[i]())
            start = time.perf_counter()
            jax.block_until_ready(calls[i]())
            times[i].append(time.perf_counter() - start)
    return times


def spread(seconds: Sequence[float]) -> float:
    """Slowest less fastest, as a share of the median."""
    return round((max(seconds) - min(seconds)) / statistics.median(seconds), 3)


def report(rows: list[dict[str, Any]], /, *, is_json: bool, **fields: Any) -> None:
    """A table on stderr (unless ``is_json``), and one JSON line with what the numbers depend on."""
    command = f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip()
    devices = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    result = {"command": command, **fields, "rows": rows, **environment(), "devices": devices}
    if not is_json:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console(stderr=True).print(table)
    print(json.dumps(result))
