"""How much anonymous memory does a conversion take, how fast is it, and does it survive kill -9?

Writes a random checkpoint with the widths of Mixtral 8x7B (fewer layers), converts it in a child
process, and compares the child's peak with the promise: twice the largest leaf plus 512 MB. With
``--kills N`` it then converts again, killing the child N times at random moments, and compares the
digests. Exits 1 if a promise is broken.

    python benchmarks/convert_memory.py --gigabytes 2 --kills 10

With ``--sweep`` the checkpoints have 1, 2, 4 and 8 GB and the same widest leaf (two experts per
full-width layer, more layers), and each conversion follows a copy of the same files by
``dd conv=fsync`` to the same disk, from a dropped page cache where that is allowed. Promises: peaks
within 10 % of each other, and at least 70 % of the throughput of dd.

    python benchmarks/convert_memory.py --sweep
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from mixtral_jax.config import PRESETS, ModelConfig, config_to_dict
from mixtral_jax.convert.names import pieces
from mixtral_jax.model.transformer import leaf_specs

LIMIT_LEAVES, LIMIT_BYTES = 2, 512 << 20
SHARD_BYTES = 1 << 30
SAMPLE_SECONDS = 0.005


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measures conversion."""

    gigabytes: float = 2.0
    """Approximate size of the checkpoint."""
    kills: int = 0
    """Kill a second conversion this many times at random moments."""
    verify: bool = False
    """Pass --verify to the conversion."""
    sweep: bool = False
    """1, 2, 4 and 8 GB, each beside dd."""
    rounds: int = 3
    """Of the sweep; each is one copy by dd and one conversion."""
    format: Literal["orbax", "safetensors"] = "orbax"
    """Convert to this format."""
    seed: int = 0
    """Of the moments of the kills."""
    folder: Path | None = None
    """Where to work; a new folder in the temporary directory unless given."""
    quick: bool = False
    """A tenth of the size and one kill: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def model_of(gigabytes: float) -> ModelConfig:
    """8x7B with fewer layers, and experts as much narrower as the size asks."""
    full = dataclasses.replace(PRESETS["mixtral-8x7b"], num_hidden_layers=1)
    target = gigabytes * 1e9
    layer = size_of(dataclasses.replace(full, num_hidden_layers=2)) - size_of(full)
    num_layers = 1 + max(0, math.floor((target - size_of(full)) / layer))
    config = dataclasses.replace(full, num_hidden_layers=num_layers)
    thin = size_of(dataclasses.replace(config, intermediate_size=1))
    share = (target - thin) / (size_of(config) - thin)
    width = round(config.intermediate_size * share / 256) * 256
    width = min(max(width, 256), config.intermediate_size)
    return dataclasses.replace(config, intermediate_size=width)


def sweep_model(gigabytes: float) -> ModelConfig:
    """Two experts of full width in each layer, and a vocabulary that is not the widest leaf."""
    full = PRESETS["mixtral-8x7b"]
    config = dataclasses.replace(
        full, num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=2, vocab_size=8192
    )
    layer = size_of(dataclasses.replace(config, num_hidden_layers=2)) - size_of(config)
    layers = 1 + round((gigabytes * 1e9 - size_of(config)) / layer)
    return dataclasses.replace(config, num_hidden_layers=max(1, layers))


def size_of(config: ModelConfig) -> int:
    """Bytes of the weights in bfloat16."""
    return sum(2 * math.prod(spec.shape) for spec in leaf_specs(config).values())


def write_checkpoint(folder: Path, config: ModelConfig) -> None:
    """A Gaussian checkpoint in shards, as published."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_dict(config)))
    shapes = {p.rows.tensor: p.tensor_shape for p in pieces("original", leaf_specs(config))}
    shard: dict[str, np.ndarray] = {}
    weight_map: dict[str, str] = {}
    last = list(shapes)[-1]
    # One draw serves all: each tensor begins elsewhere in it.
    pool = rng.standard_normal(max(map(math.prod, shapes.values())) + 4096, np.float32)
    pool = (pool * config.initializer_range).astype(ml_dtypes.bfloat16)
    for k, (name, shape) in enumerate(shapes.items()):
        start = k * 7 % 4096
        drawn = pool[start : start + math.prod(shape)].reshape(shape)
        shard[name] = np.ones(shape, ml_dtypes.bfloat16) if len(shape) == 1 else drawn
        if sum(w.nbytes for w in shard.values()) >= SHARD_BYTES or name == last:
            file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
            save_file(shard, folder / file)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def start(src: Path, dst: Path, verify: bool, format: str = "orbax") -> subprocess.Popen[str]:
    """A conversion in a child process."""
    command = [sys.executable, "-m", "mixtral_jax.convert", str(src), str(dst), "--json"]
    command += ["--format", format]
    return subprocess.Popen(
        command + ["--verify"] * verify, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process, 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return int(line.split()[1]) * 1024 if line else 0


def measure(src: Path, dst: Path, verify: bool, format: str = "orbax") -> dict[str, Any]:
    """Converts to the end, sampling the child's memory."""
    child = start(src, dst, verify, format)
    peak = 0
    while child.poll() is None:
        peak = max(peak, anonymous_bytes(child.pid))
        time.sleep(SAMPLE_SECONDS)
    stdout, stderr = child.communicate()
    if child.returncode != 0:
        raise SystemExit(f"the conversion failed: {stderr}")
    return {**json.loads(stdout), "sampled_peak_bytes": peak}


def kill_and_resume(
    src: Path, dst: Path, *, kills: int, seconds: float, seed: int
) -> dict[str, Any]:
    """Converts with kills at random moments, then to the end."""
    rng = random.Random(seed)
    started = time.monotonic()
    landed = redone = 0
    for _ in range(kills):
        child = start(src, dst, verify=False)
        # Over the whole run: the kills before the last one leave less and less to do.
        time.sleep(rng.uniform(0.5, 1.0 + seconds / 2))
        landed += child.poll() is None
        child.kill()
        child.communicate()
        if dst.exists():
            shutil.rmtree(dst)
            redone += 1
    report = measure(src, dst, verify=False)
    report |= {"kills": landed, "restarts": redone, "seconds": time.monotonic() - started}
    return report


def drop_cache() -> bool:
    """Forgets what the page cache holds; False where that is not allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def copy(src: Path, dst: Path) -> float:
    """Seconds that dd takes to copy the files of a folder durably."""
    dst.mkdir()
    started = time.monotonic()
    for path in sorted(src.iterdir()):
        command = ["dd", f"if={path}", f"of={dst / path.name}", "bs=16M", "conv=fsync"]
        subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - started


def sweep_one(gigabytes: float, options: Options, folder: Path) -> dict[str, Any]:
    """One size: dd and the conversion in turn, each pair removed after both; medians."""
    config = sweep_model(gigabytes)
    write_checkpoint(folder / "hf", config)
    copies, seconds, walls, peaks = [], [], [], []
    cold = True
    for k in range(2 * options.rounds):
        cold = drop_cache() and cold
        # dd, convert, convert, dd, ...: neither always writes to the blocks that were just freed.
        if k % 4 in (0, 3):
            copies.append(copy(folder / "hf", folder / "dd"))
        else:
            started = time.monotonic()
            report = measure(folder / "hf", folder / "out", options.verify, options.format)
            walls.append(time.monotonic() - started)
            seconds.append(report["seconds"])
            peaks.append(report["sampled_peak_bytes"])
        if k % 2:
            shutil.rmtree(folder / "dd")
            shutil.rmtree(folder / "out")
    shutil.rmtree(folder / "hf")
    leaf = max(2 * math.prod(spec.shape) for spec in leaf_specs(config).values())
    convert, dd = statistics.median(seconds), statistics.median(copies)
    limit = LIMIT_LEAVES * leaf + LIMIT_BYTES
    return {
        "checkpoint_bytes": report["bytes"],
        "layers": config.num_hidden_layers,
        "largest_leaf_bytes": leaf,
        "limit_bytes": limit,
        "peak_anonymous_bytes": max(peaks),
        "convert_seconds": [round(value, 2) for value in seconds],
        "process_seconds": [round(value, 2) for value in walls],
        "dd_seconds": [round(value, 2) for value in copies],
        "gigabytes_per_second": round(report["bytes"] / convert / 1e9, 3),
        "dd_gigabytes_per_second": round(report["bytes"] / dd / 1e9, 3),
        "share_of_dd": round(dd / convert, 3),
        "page_cache": "dropped" if cold else "warm",
        "within_limit": max(peaks) <= limit,
    }


def sweep(options: Options) -> int:
    """All sizes, as a table and a JSON line."""
    sizes = [size / 10 if options.quick else size for size in (1.0, 2.0, 4.0, 8.0)]
    folder = Path(tempfile.mkdtemp(prefix="convert-sweep-", dir=options.folder))
    try:
        rows = [sweep_one(size, options, folder) for size in sizes]
    finally:
        shutil.rmtree(folder)
    peaks = [row["peak_anonymous_bytes"] for row in rows]
    table = Table(*rows[0], title="Conversion by size")
    for row in rows:
        table.add_row(*(f"{v:,}" if type(v) is int else str(v) for v in row.values()))
    total = sum(row["checkpoint_bytes"] / row["gigabytes_per_second"] for row in rows)
    copied = sum(row["checkpoint_bytes"] / row["dd_gigabytes_per_second"] for row in rows)
    result = {
        "command": f"python benchmarks/convert_memory.py {' '.join(sys.argv[1:])}",
        "sizes": rows,
        "peak_spread": round(max(peaks) / min(peaks) - 1, 4),
        "share_of_dd_over_all": round(copied / total, 3),
        "format": options.format,
        "verify": options.verify,
        **environment(),
    }
    if not options.json:
        Console(width=200).print(table)
    print(json.dumps(result))
    kept = result["peak_spread"] <= 0.1 and result["share_of_dd_over_all"] >= 0.7
    return 0 if kept and all(row["within_limit"] for row in rows) else 1


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    versions = {name: version(name) for name in ("jax", "orbax-checkpoint", "numpy")}
    return {"versions": versions, "device": f"{platform.machine()}, {os.cpu_count()} CPUs"}


def main(options: Options) -> int:
    """Runs, prints, and says whether the promises hold."""
    if options.sweep:
        return sweep(options)
    if options.quick:
        options = dataclasses.replace(options, gigabytes=options.gigabytes / 10, kills=1)
    config = model_of(options.gigabytes)
    leaf = max(2 * math.prod(spec.shape) for spec in leaf_specs(config).values())
    limit = LIMIT_LEAVES * leaf + LIMIT_BYTES
    folder = Path(tempfile.mkdtemp(prefix="convert-memory-", dir=options.folder))
    try:
        write_checkpoint(folder / "hf", config)
        report = measure(folder / "hf", folder / "out", options.verify, options.format)
        killed = None
        if options.kills:
            killed = kill_and_resume(
                folder / "hf",
                folder / "killed",
                kills=options.kills,
                seconds=report["seconds"],
                seed=options.seed,
            )
    finally:
        shutil.rmtree(folder)
    peak = report["sampled_peak_bytes"]
    rate = report["bytes"] / report["seconds"]
    result = {
        "checkpoint_bytes": report["bytes"],
        "layers": config.num_hidden_layers,
        "largest_leaf_bytes": leaf,
        "limit_bytes": limit,
        "peak_anonymous_bytes": peak,
        "self_reported_peak_bytes": report["peak_rss_bytes"],
        "seconds": round(report["seconds"], 2),
        "gigabytes_per_second": round(rate / 1e9, 3),
        "verify": options.verify,
        "within_limit": peak <= limit,
        "digest": report["digest"],
    }
    if killed:
        result |= {
            "kills": killed["kills"],
            "restarts_after_completion": killed["restarts"],
            "killed_digest_equal": killed["digest"] == report["digest"],
        }
    result |= environment()
    if options.json:
        print(json.dumps(result))
    else:
        table = Table("measure", "value", title="Conversion")
        for name, value in result.items():
            table.add_row(name, f"{value:,}" if type(value) is int else str(value))
        Console().print(table)
        print(json.dumps(result))
    return 0 if result["within_limit"] and result.get("killed_digest_equal", True) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
