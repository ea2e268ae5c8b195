"""Does a checkpoint of real widths convert and sample on a mesh, and with what memory?

Writes a Gaussian 8x7B folder of full width and few layers (two: about 6 GB in bf16), with a
tokenizer, converts it, and samples from the result on ``--mesh``; both in child processes whose
peak memory is sampled. Prints a table and JSON.

    python benchmarks/full_width.py --tokenizer tokenizer.model
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tyro
from convert_memory import size_of, write_checkpoint
from rich.console import Console
from rich.table import Table

from mixtral_jax.config import PRESETS
from mixtral_jax.language_model import EMBEDDED_FOLDER

SAMPLE_SECONDS = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Converts and samples a checkpoint of full width."""

    layers: int = 2
    """Of the 32 of Mixtral 8x7B."""
    tokenizer: Path | None = None
    """A tokenizer.model; the embedded model's unless given."""
    mesh: str = "1x8"
    """For sampling."""
    prompt: str = "The quick brown fox"
    """One row of the batch; the other is the same text twice over."""
    max_new_tokens: int = 8
    """Per row."""
    quick: bool = False
    """An eighth of the widths: does it still run?"""
    folder: Path | None = None
    """Where to work; a new folder in the temporary directory unless given."""


def run(verb: str, *arguments: str) -> tuple[list[dict[str, Any]], int, float]:
    """A command's JSON lines, its peak resident bytes and its seconds."""
    command = [sys.executable, "-m", f"mixtral_jax.{verb}", *arguments, "--json"]
    started = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = 0
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            break
        line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "0 0")
        peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(SAMPLE_SECONDS)
    stdout, _ = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"{verb} failed with exit code {child.returncode}")
    return [json.loads(line) for line in stdout.splitlines()], peak, time.monotonic() - started


def main(options: Options) -> int:
    """Runs and prints."""
    config = dataclasses.replace(PRESETS["mixtral-8x7b"], num_hidden_layers=options.layers)
    if options.quick:
        config = dataclasses.replace(
            config, hidden_size=512, intermediate_size=1792, num_attention_heads=8, head_dim=64
        )
    folder = Path(tempfile.mkdtemp(prefix="full-width-", dir=options.folder))
    try:
        write_checkpoint(folder / "hf", config)
        tokenizer = options.tokenizer or EMBEDDED_FOLDER / "tokenizer.model"
        shutil.copy(tokenizer, folder / "hf" / "tokenizer.model")
        converted, convert_peak, _ = run("convert", str(folder / "hf"), str(folder / "out"))
        shutil.rmtree(folder / "hf")
        rows, sample_peak, sample_seconds = run(
            "sample",
            str(folder / "out"),
            *("--mesh", options.mesh),
            *("--prompt", options.prompt, "--prompt", f"{options.prompt} {options.prompt}"),
            *("--max-new-tokens", str(options.max_new_tokens)),
        )
    finally:
        shutil.rmtree(folder)
    stats = rows[0]["stats"]
    result = {
        "layers": options.layers,
        "weight_bytes": size_of(config),
        "convert_seconds": round(converted[0]["seconds"], 1),
        "convert_peak_anonymous_bytes": converted[0]["peak_rss_bytes"],
        "convert_peak_resident_bytes": convert_peak,
        "mesh": options.mesh,
        "sample_seconds": round(sample_seconds, 1),
        "sample_peak_resident_bytes": sample_peak,
        **{name: round(value, 2) for name, value in stats.items()},
        "tokens": [len(row["token_ids"]) for row in rows],
        "dropped": rows[0]["dropped"],
        "versions": {name: version(name) for name in ("jax", "flax", "orbax-checkpoint")},
        "device": f"{platform.machine()}, {os.cpu_count()} CPUs",
    }
    table = Table("measure", "value", title="Full width")
    for name, value in result.items():
        table.add_row(name, f"{value:,}" if type(value) is int else str(value))
    Console(stderr=True).print(table)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
