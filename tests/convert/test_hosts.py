"""Two processes load one checkpoint together: each reads its own part, and the bits are right."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.convert import checkpoints

ROOT = Path(__file__).parents[2]
SECONDS = 120

# Loads on two meshes, compares what this process holds with the file of expected leaves.
PROCESS = """
import json, sys
from collections import Counter
import jax, numpy as np
folder, expected, port, rank = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(rank))
from mixtral_jax.config import read_config
from mixtral_jax.convert import load_weights
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import weight_shardings
config = read_config(folder)
want = np.load(expected)
report = {"devices": jax.device_count(), "meshes": {}}
for name in ("1x8", "2x4"):
    spec = MeshSpec.parse(name).fit(config)
    shardings = weight_shardings(leaf_specs(config), spec.build())
    reads, differing = Counter(), []
    found = load_weights(folder, config, sharding_of=shardings.__getitem__,
                         expert_shards=spec.expert, reads=reads)
    for leaf, weight in found.items():
        slots = getattr(weight, "slots", (weight,))
        for i, array in enumerate(slots):
            whole = want[leaf][i :: len(slots)] if weight is not array else want[leaf]
            assert array.shape == whole.shape and len(array.addressable_shards) == 4
            for shard in array.addressable_shards:
                if np.asarray(shard.data).tobytes() != whole[shard.index].tobytes():
                    differing.append(leaf)
    experts = sum(n for (leaf, _), n in reads.items() if ".experts." in leaf)
    report["meshes"][name] = {"differing": differing, "expert_bytes": experts}
print(json.dumps(report))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def load_in_two(folder: Path, expected: Path) -> list[dict]:
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(folder), str(expected), port, str(rank)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in outputs]


@pytest.mark.parametrize("kind", ["published", "orbax"])
def test_each_process_reads_its_part_bit_exact(tmp_path, small_config, kind):
    from mixtral_jax.convert import convert

    config = small_config()
    tensors = checkpoints.random_tensors(config)
    folder = checkpoints.write(tmp_path / "hf", config, tensors)
    if kind == "orbax":
        convert(folder, tmp_path / "ours")
        folder = tmp_path / "ours"
    leaves = checkpoints.leaves(tensors, config)
    experts = sum(w.nbytes for leaf, w in leaves.items() if ".experts." in leaf)
    planted = "layers.1.moe.experts.down"
    if kind == "published":  # negative control: one wrong value in what is expected
        leaves[planted] = leaves[planted].copy()
        leaves[planted][0, 0, 0] += 1
    np.savez(tmp_path / "expected.npz", allow_pickle=False, **leaves)
    reports = load_in_two(folder, tmp_path / "expected.npz")
    assert [report["devices"] for report in reports] == [8, 8]
    for mesh, share in (("1x8", 2), ("2x4", 1)):  # on 2x4 each process holds all four shards
        for rank, report in enumerate(reports):
            found = report["meshes"][mesh]
            assert found["expert_bytes"] == experts // share, mesh
            holds_planted = kind == "published" and (mesh == "2x4" or rank == 0)
            assert found["differing"] == [planted] * holds_planted, (mesh, rank)
