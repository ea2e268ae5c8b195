"""Ours and transformers at a size of which only one fits: processes that take turns, A B A B.

Each process draws Gaussian weights on the device. Ours is decode.py and prefill.py, theirs
peer_alone.py; the medians over the turns are compared.

    python benchmarks/in_turns.py --model mixtral-8x7b --json
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from _common import Cases, run_script
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Cases):
    """Compares with transformers in processes that take turns."""

    turns: int = 2
    """Of each side."""
    rounds: int = 3
    """Repeats in each process."""
    steps: int = 64
    """Tokens decoded per row and repeat."""
    quick: bool = False
    """The small model and one turn: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def child(script: str, options: Options, *more: str) -> dict[str, Any]:
    """The JSON line of another benchmark; what it says on stderr is passed on."""
    shared = ["--model", options.model, "--dtype", options.dtype, "--rounds", str(options.rounds)]
    if options.layers is not None:
        shared += ["--layers", str(options.layers)]
    path = Path(__file__).with_name(script)
    command = [sys.executable, str(path), *shared, *more, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def ours(options: Options) -> tuple[dict[tuple[str, int], float], dict[str, Any]]:
    """Tokens per second by case, and what the numbers depend on."""
    batches, lengths = (tuple(map(str, each)) for each in (options.batches, options.lengths))
    steps = ("--steps", str(options.steps))
    decode = child("decode.py", options, *steps, "--batches", *batches)
    prefill = child("prefill.py", options, "--lengths", *lengths)
    rates = {("decode", row["batch"]): row["tok/s"] for row in decode["rows"]}
    rates |= {("prefill", row["tokens"]): row["tok/s"] for row in prefill["rows"]}
    return rates, {name: decode[name] for name in ("versions", "device", "devices")}


def theirs(options: Options) -> dict[tuple[str, int], float]:
    """Tokens per second by case."""
    batches, lengths = (tuple(map(str, each)) for each in (options.batches, options.lengths))
    steps = ("--steps", str(options.steps))
    found = child("peer_alone.py", options, *steps, "--batches", *batches, "--lengths", *lengths)
    return {(row["what"], row["case"]): row["tok/s"] for row in found["rows"]}


def main(options: Options) -> int:
    """Runs and prints."""
    if options.quick:
        options = dataclasses.replace(
            options, model="small", batches=(1,), lengths=(32,), steps=4, rounds=1, turns=1
        )
    ours_rates, their_rates, facts = [], [], {}
    for _ in range(options.turns):
        rates, facts = ours(options)
        ours_rates.append(rates)
        their_rates.append(theirs(options))
    rows = []
    for what, case in ours_rates[0]:
        a, b = (
            statistics.median(turn[what, case] for turn in turns)
            for turns in (ours_rates, their_rates)
        )
        rates = {"ours tok/s": round(a, 1), "theirs tok/s": round(b, 1), "ratio": round(a / b, 3)}
        rows.append({"what": what, "case": case, **rates})
    if not options.json:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console(stderr=True).print(table)
    command = f"python benchmarks/in_turns.py {' '.join(sys.argv[1:])}".strip()
    print(json.dumps({"command": command, **dataclasses.asdict(options), "rows": rows, **facts}))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
