"""Sizes of quantized weights, by scheme or of a folder: those of the arrays that loading makes.

The matrices of attention and experts are quantized; router, norms, embeddings and head are not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias, get_args

import jax
import numpy as np
from jax.sharding import PartitionSpec

from mixtral_jax.config import PRESETS, ModelConfig, read_config
from mixtral_jax.convert.leaves import is_checkpoint, open_leaves
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.convert.parts import part_spec, quantized_weights, stored_specs
from mixtral_jax.convert.quantized.methods import read_method
from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.model.transformer import LeafSpec, leaf_specs
from mixtral_jax.qtensor import Nested, QTensor
from mixtral_jax.quantize.makers import DataFree, Recipe
from mixtral_jax.quantize.source import is_quantized, made_specs
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.quantized import check_groups
from mixtral_jax.sharding.report import WeightRow, shard_shape, weight_report
from mixtral_jax.sharding.rules import kind_specs
from mixtral_jax.sharding.strategy import Strategy

# What `--quantize` makes at load; of gptq in so many bits, what published checkpoints have.
DOUBLE_QUANT = "nf4-double-quant"
GPTQ = {f"gptq{bits}": bits for bits in (2, 3, 4, 8)}
SCHEMES = (*get_args(DataFree), DOUBLE_QUANT, "gptq", *GPTQ)
GPTQ_GROUP = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Stored:
    """The quantized weights of a folder, with shapes in place of arrays, by path.

    It stands where a scheme does: what is loaded is what lies there.
    """

    weights: Mapping[str, QTensor]

    @property
    def schemes(self) -> list[str]:
        """In which its weights are."""
        return sorted({q.scheme for q in self.weights.values()})

    def __str__(self):
        return ", ".join(self.schemes)


Scheme: TypeAlias = str | Stored


def stored_in(model: str, asked: str | None = None) -> Stored | None:
    """The quantized weights of a folder; None for a preset and for plain weights.

    No weights are read, but what tells their shapes.

    Args:
        model: a preset or a folder.
        asked: the scheme that loading would be asked for.

    Raises:
        MixtralError: as ``open_leaves``; exit code 65 if it is in another scheme than asked.
    """
    if model in PRESETS:
        return None
    folder, config = Path(model), read_config(model, note=lambda line: None)
    specs = leaf_specs(config)
    if is_checkpoint(folder) == "orbax":
        stored = stored_specs(specs, read_manifest(folder).leaves)
    elif read_method(folder, lambda line: None) is None:
        return None
    else:
        leaves = open_leaves(folder, specs, head_dim=config.head_dim)
        stored = dict(leaves.specs)
        leaves.close()
    found = Stored(quantized_weights(stored, config.dtype))
    if asked is not None and found.weights and found.schemes != [asked]:
        raise MixtralError(
            f"--quantize {asked}: {model} is quantized already",
            expected=f"a checkpoint in {asked} or in 16 or 32 bits",
            got=str(found),
            fix="leave out --quantize",
            code=BAD_DATA,
        )
    return found if found.weights else None


def quantized_parts(leaf: str, spec: LeafSpec, scheme: str) -> QTensor:
    """The parts of a quantized weight, with shapes in place of arrays.

    GPTQ (4 bits unless its name says so): groups of 128 with 16-bit scales and zero points, and an
    activation order.
    """
    scheme = "gptq4" if scheme == "gptq" else scheme
    if scheme not in GPTQ:
        is_double = scheme == DOUBLE_QUANT
        recipe = Recipe(scheme="nf4" if is_double else scheme, double_quant=is_double)
        parts = made_specs(leaf, spec, recipe)
    else:
        inputs = spec.shape[-1]
        groups = 1 if inputs % GPTQ_GROUP else inputs // GPTQ_GROUP
        parts = {
            f"{leaf}.{scheme}.{part}": part_spec(spec, scheme, part, groups, "float16")
            for part in ("codes", "scales", "zeros", "order")
        }
    return quantized_weights(parts, spec.dtype)[leaf]


def shard_bytes(q: QTensor, spec: PartitionSpec, mesh: MeshSpec) -> int:
    """Bytes of one device's part of a quantized weight, as ``make_ready`` leaves it.

    Scales are nested only where the matrix is not split, and experts whose inputs are split have no
    order.
    """
    local = shard_shape(q.shape, spec, mesh)
    if local[-2:] != q.shape[-2:] and isinstance(q.scales, Nested):
        plain = jax.ShapeDtypeStruct(q.scales.shape, np.float32)
        q = dataclasses.replace(q, scales=plain)
    if len(q.shape) == 3 and local[-1] != q.shape[-1]:
        q = dataclasses.replace(q, order=None)
    sizes = jax.tree.map(
        lambda part, its: math.prod(shard_shape(part.shape, its, mesh)) * part.dtype.itemsize,
        q,
        kind_specs(q, spec),
    )
    return sum(jax.tree.leaves(sizes))


class Weights(NamedTuple):
    """Bytes of one device's weights: all of them, those of its experts, and the input embedding."""

    total: int
    experts: int
    embedding: int


def check_scheme(scheme: Scheme | None) -> None:
    """Refuses an unknown scheme (exit code 64)."""
    if isinstance(scheme, str) and scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        fix = "name one of them, or leave it out"
        raise MixtralError("--quantize", expected=known, got=repr(scheme), fix=fix, code=USAGE)


def weight_bytes(
    config: ModelConfig,
    mesh: MeshSpec,
    strategy: Strategy,
    *,
    dtype: str | None = None,
    scheme: Scheme | None = None,
) -> Weights:
    """What the weights at rest cost a device, quantized or not.

    Args:
        config: sizes.
        mesh: already fitted to the model.
        strategy: where weights rest.
        dtype: of what is not quantized; the config's unless given.
        scheme: what attention and experts are quantized to, or what a folder holds.

    Raises:
        MixtralError: exit code 64 for an unknown scheme, 78 for groups that the mesh would cut.
    """
    check_scheme(scheme)
    total = experts = embedding = 0
    for row in weight_report(config, mesh, strategy, dtype):
        size = row.bytes_per_device
        leaf = LeafSpec(row.shape, row.axes, np.dtype(dtype or config.dtype))
        if isinstance(scheme, Stored):
            paths = [row.weight.replace("*", str(layer)) for layer in range(row.count)]
            parts = [scheme.weights.get(path) for path in paths]
            each = row.bytes_per_device // row.count
            size = sum(each if q is None else _bytes_of(q, row, mesh) for q in parts)
        elif scheme is not None and is_quantized(leaf, scheme):
            q = quantized_parts(row.weight, leaf, scheme)
            size = row.count * _bytes_of(q, row, mesh)
        total += size
        if "expert" in row.axes:
            experts += size
        if row.weight == "embed_tokens":
            embedding += size
    return Weights(total, experts, embedding)


def _bytes_of(q: QTensor, row: WeightRow, mesh: MeshSpec) -> int:
    """Of one such weight of a row; refuses groups that the mesh would cut."""
    local = shard_shape(row.shape, row.spec, mesh)
    check_groups(row.weight, q, row.shape[-1] // local[-1])
    return shard_bytes(q, row.spec, mesh)
