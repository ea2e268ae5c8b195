"""How fast does a Hugging Face folder load onto the mesh, beside the Orbax folder made from it?

Writes a random checkpoint of full width, converts it, and loads both in turn, each in a process of
its own, on 1x1 and on a simulated 1x8, with and without proving the digests (only a converted
folder has some). Exits 1 if the direct load is slower per byte than 80 % of the other, unproved.

    python benchmarks/load_speed.py --gigabytes 3
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro
from convert_memory import drop_cache, environment, model_of, write_checkpoint
from rich.console import Console
from rich.table import Table

from mixtral_jax.convert import convert

LEAST_SHARE = 0.8
CHILD = """
import json, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
from mixtral_jax.config import read_config
from mixtral_jax.convert import load_weights
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import weight_shardings
folder, mesh, verify = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
config = read_config(folder)
spec = MeshSpec.parse(mesh).fit(config)
shardings = weight_shardings(leaf_specs(config), spec.build())
done = []
start = time.perf_counter()
leaves = load_weights(folder, config, sharding_of=shardings.__getitem__,
                      expert_shards=spec.expert, verify=verify, progress=done.append)
jax.block_until_ready([getattr(leaf, "slots", leaf) for leaf in leaves.values()])
print(json.dumps([time.perf_counter() - start, sum(done)]))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Measures loading."""

    gigabytes: float = 3.0
    """Approximate size of the checkpoint."""
    rounds: int = 4
    """Loads of each kind, in turn, there and back."""
    quick: bool = False
    """The smallest checkpoint and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def load(folder: Path, mesh: str, verify: bool) -> tuple[float, int]:
    """Seconds and bytes of one load in a new process, from a dropped page cache if possible."""
    drop_cache()
    command = [sys.executable, "-c", CHILD, str(folder), mesh, str(verify)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, num_bytes = json.loads(done.stdout)
    return seconds, num_bytes


def main(options: Options) -> int:
    """Runs, prints, and says whether the promise holds."""
    config = model_of(0.9 if options.quick else options.gigabytes)
    rounds = 1 if options.quick else options.rounds
    folder = Path(tempfile.mkdtemp(prefix="load-speed-"))
    kinds = {"direct": ("hf", False), "orbax": ("ours", False), "orbax, proved": ("ours", True)}
    rows: list[dict[str, Any]] = []
    try:
        write_checkpoint(folder / "hf", config)
        convert(folder / "hf", folder / "ours")
        for mesh in ("1x1", "1x8"):
            rates: dict[str, list[float]] = {kind: [] for kind in kinds}
            for k in range(rounds):
                order = list(kinds.items())[:: 1 if k % 2 else -1]
                for kind, (name, verify) in order:
                    seconds, num_bytes = load(folder / name, mesh, verify)
                    rates[kind].append(num_bytes / seconds / 1e9)
            row: dict[str, Any] = {"mesh": mesh, "bytes": num_bytes}
            row |= {kind: round(statistics.median(found), 3) for kind, found in rates.items()}
            row["all"] = {kind: [round(rate, 2) for rate in found] for kind, found in rates.items()}
            row["direct / orbax"] = round(row["direct"] / row["orbax"], 3)
            rows.append(row)
    finally:
        shutil.rmtree(folder)
    result = {
        "command": f"python benchmarks/load_speed.py {' '.join(sys.argv[1:])}".strip(),
        "unit": "GB/s, median",
        "rounds": rounds,
        "meshes": rows,
        **environment(),
    }
    if options.json:
        print(json.dumps(result))
    else:
        columns = [name for name in rows[0] if name != "all"]
        table = Table(*columns, title="Loading, GB/s")
        for row in rows:
            table.add_row(*(str(row[name]) for name in columns))
        Console().print(table)
        print(json.dumps(result))
    return 0 if all(row["direct / orbax"] >= LEAST_SHARE for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
