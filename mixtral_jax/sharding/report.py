"""What every weight costs a device, before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jax.sharding import PartitionSpec

from mixtral_jax.config import PRESETS, ModelConfig, read_config
from mixtral_jax.errors import BAD_CONFIG, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.json_file import read_json
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.qtensor import SCHEMES
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.rules import partition_spec
from mixtral_jax.sharding.strategy import Strategy

# Files that say that published weights are quantized, beside config.json.
_QUANTIZED = ("quantize_config.json", "quant_config.json")


def find_config(model: str) -> ModelConfig:
    """The configuration of a preset or of a folder.

    Raises:
        MixtralError: exit code 66 if it is neither.
    """
    if model in PRESETS:
        return PRESETS[model]
    try:
        return read_config(model, note=lambda line: None)
    except MixtralError as error:
        if error.code != INPUT_NOT_FOUND:
            raise
        known = ", ".join(PRESETS)
        raise MixtralError(
            f"no model {model}", fix=f"name a folder or one of {known}", code=INPUT_NOT_FOUND
        ) from None


def refuse_quantized(model: str) -> None:
    """Refuses a folder whose weights are quantized: ``weight_report`` is of plain ones.

    Raises:
        MixtralError: exit code 78.
    """
    folder = Path(model)
    if model in PRESETS or not folder.is_dir():
        return
    config = folder / "config.json"
    says_so = config.is_file() and read_json(config).get("quantization_config") is not None
    says_so = says_so or any((folder / name).is_file() for name in _QUANTIZED)
    parts = [path.name.rsplit(".", 2) for path in folder.glob("weights/*.codes")]
    if says_so or any(len(part) == 3 and part[1] in SCHEMES for part in parts):
        raise MixtralError(
            f"{model} is quantized: this table is of plain weights",
            fix=f"python -m mixtral_jax.plan --model {model} counts what lies there",
            code=BAD_CONFIG,
        )


class WeightRow(NamedTuple):
    """Weights that differ in their layer only.

    ``bytes_per_device`` is of all ``count`` of them together.
    """

    weight: str
    count: int
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    spec: PartitionSpec
    bytes_per_device: int


def shard_shape(shape: tuple[int, ...], spec: PartitionSpec, mesh: MeshSpec) -> tuple[int, ...]:
    """The part of an array that one device holds."""
    found = []
    for size, entry in zip(shape, (*spec, *[None] * (len(shape) - len(spec))), strict=True):
        names = (entry,) if isinstance(entry, str) else (entry or ())
        ways = math.prod(getattr(mesh, name) for name in names)
        assert size % ways == 0, (shape, spec, str(mesh))
        found.append(size // ways)
    return tuple(found)


def weight_report(
    config: ModelConfig, mesh: MeshSpec, strategy: Strategy, dtype: str | None = None
) -> list[WeightRow]:
    """One row per kind of weight, in the order of the model; nothing is allocated.

    Args:
        config: sizes.
        mesh: already fitted to the model.
        strategy: where weights rest.
        dtype: of the weights; the config's unless given.
    """
    rows: dict[str, WeightRow] = {}
    rules = strategy.rest_rules()
    for path, leaf in leaf_specs(config, dtype).items():
        name = re.sub(r"^layers\.\d+\.", "layers.*.", path)
        spec = partition_spec(leaf.axes, rules)
        size = math.prod(shard_shape(leaf.shape, spec, mesh)) * np.dtype(leaf.dtype).itemsize
        before = rows.get(name)
        count, total = (before.count, before.bytes_per_device) if before else (0, 0)
        rows[name] = WeightRow(name, count + 1, leaf.shape, leaf.axes, spec, total + size)
    return list(rows.values())


def lines(rows: list[WeightRow]) -> Iterator[str]:
    """The table as text."""
    cells = [("weight", "count", "shape", "axes", "spec", "MiB per device")]
    for row in rows:
        cells.append(
            (
                row.weight,
                str(row.count),
                " x ".join(map(str, row.shape)),
                ", ".join(row.axes),
                ", ".join(_entry(entry) for entry in row.spec),
                f"{row.bytes_per_device / 2**20:,.2f}",
            )
        )
    total = sum(row.bytes_per_device for row in rows)
    cells.append(("total", "", "", "", "", f"{total / 2**20:,.2f}"))
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        left = [cell.ljust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        yield "  ".join([*left, row[-1].rjust(widths[-1])])


def _entry(entry: object) -> str:
    if entry is None:
        return "-"
    return entry if isinstance(entry, str) else " x ".join(entry)  # type: ignore[arg-type]
