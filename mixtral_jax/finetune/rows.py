"""Rows of a batch over devices and processes: each process brings those that its devices hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.finetune.options import FinetuneOptions
from mixtral_jax.sharding.mesh import MeshSpec

_AXES = ("data", "expert")  # of the mesh, which share the rows; along tensor all hold the same


class Share(NamedTuple):
    """The part of every batch that a process brings, of so many equal ones."""

    part_id: int
    num_parts: int


def num_rows(spec: MeshSpec, per_device: int) -> int:
    """Rows of one forward pass over all devices."""
    return per_device * spec.data * spec.expert


def check_pairs(options: FinetuneOptions, spec: MeshSpec, num_parts: int = 1) -> None:
    """Refuses rows of dpo that are no pairs in every part of a batch.

    Raises:
        MixtralError: exit code 78.
    """
    if options.train.method != "dpo":
        return
    training = options.train.per_device_train_batch_size
    evaluation = options.run.per_device_eval_batch_size or training
    for name, per_device in (("train", training), ("eval", evaluation)):
        rows = num_rows(spec, per_device) // num_parts
        if rows % 2:
            raise MixtralError(
                f"--per-device-{name}-batch-size",
                expected="an even number of rows in each process, for pairs",
                got=f"{rows} ({per_device} a device on the mesh {spec})",
                fix=f"--per-device-{name}-batch-size {per_device + 1}",
                code=BAD_CONFIG,
            )


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Where accumulation steps of rows ``[A, B, T]`` lie."""
    return NamedSharding(mesh, PartitionSpec(None, _AXES))


def share_of(mesh: Mesh) -> Share:
    """This process's part of the rows; processes that share a tensor axis have the same part.

    Raises:
        MixtralError: exit code 78 where two processes hold some of the same rows, but not all.
    """
    ways = mesh.shape["data"] * mesh.shape["expert"]
    lie = NamedSharding(mesh, PartitionSpec(_AXES)).devices_indices_map((ways,))
    held: dict[int, set[int]] = {}
    for device, (rows,) in lie.items():
        held.setdefault(device.process_index, set()).add(rows.start or 0)
    return part_of(held, jax.process_index())


def part_of(held: Mapping[int, set[int]], process_id: int) -> Share:
    """As ``share_of``, from the blocks of rows that the devices of each process hold."""
    parts = sorted({tuple(sorted(blocks)) for blocks in held.values()})
    num_blocks = len(set().union(*held.values()))
    if any(len(part) * len(parts) != num_blocks for part in parts):
        raise MixtralError(
            "--mesh",
            expected="processes that hold rows of their own, or all the rows of another",
            got=f"{len(held)} processes that hold some of the rows of another",
            fix="a tensor axis that divides the devices of a process, or is a multiple of them",
            code=BAD_CONFIG,
        )
    return Share(parts.index(tuple(sorted(held[process_id]))), len(parts))
