"""Sizes of quantized weights, by scheme: those of the arrays that loading makes.

The matrices of attention and experts are quantized; router, norms, embeddings and head are not.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, get_args

import jax
import numpy as np
from jax.sharding import PartitionSpec

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.parts import part_spec, quantized_weights
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.model.transformer import LeafSpec
from mixtral_jax.qtensor import Nested, QTensor
from mixtral_jax.quantize.makers import DataFree, Recipe
from mixtral_jax.quantize.source import is_quantized, made_specs
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.quantized import check_groups
from mixtral_jax.sharding.report import shard_shape, weight_report
from mixtral_jax.sharding.rules import kind_specs
from mixtral_jax.sharding.strategy import Strategy

# What `--quantize` makes at load; of gptq, what published checkpoints have.
DOUBLE_QUANT = "nf4-double-quant"
SCHEMES = (*get_args(DataFree), DOUBLE_QUANT, "gptq")
GPTQ_GROUP = 128


def quantized_parts(leaf: str, spec: LeafSpec, scheme: str) -> QTensor:
    """The parts of a quantized weight, with shapes in place of arrays.

    GPTQ: 4 bits, groups of 128 with 16-bit scales and zero points, and an activation order.
    """
    if scheme != "gptq":
        is_double = scheme == DOUBLE_QUANT
        recipe = Recipe(scheme="nf4" if is_double else scheme, double_quant=is_double)
        parts = made_specs(leaf, spec, recipe)
    else:
        inputs = spec.shape[-1]
        groups = 1 if inputs % GPTQ_GROUP else inputs // GPTQ_GROUP
        parts = {
            f"{leaf}.gptq4.{part}": part_spec(spec, "gptq4", part, groups, "float16")
            for part in ("codes", "scales", "zeros", "order")
        }
    return quantized_weights(parts, spec.dtype)[leaf]


def shard_bytes(q: QTensor, spec: PartitionSpec, mesh: MeshSpec) -> int:
    """Bytes of one device's part of a quantized weight; nested scales only where not split."""
    is_split = shard_shape(q.shape, spec, mesh)[-2:] != q.shape[-2:]
    if is_split and isinstance(q.scales, Nested):
        plain = jax.ShapeDtypeStruct(q.scales.shape, np.float32)
        q = dataclasses.replace(q, scales=plain)
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


def check_scheme(scheme: str | None) -> None:
    """Refuses an unknown scheme (exit code 64)."""
    if scheme is not None and scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        fix = "name one of them, or leave it out"
        raise MixtralError("--quantize", expected=known, got=repr(scheme), fix=fix, code=USAGE)


def weight_bytes(
    config: ModelConfig,
    mesh: MeshSpec,
    strategy: Strategy,
    *,
    dtype: str | None = None,
    scheme: str | None = None,
) -> Weights:
    """What the weights at rest cost a device, quantized or not.

    Raises:
        MixtralError: exit code 64 for an unknown scheme, 78 for groups that the mesh would cut.
    """
    check_scheme(scheme)
    total = experts = embedding = 0
    for row in weight_report(config, mesh, strategy, dtype):
        size = row.bytes_per_device
        leaf = LeafSpec(row.shape, row.axes, np.dtype(dtype or config.dtype))
        if scheme is not None and is_quantized(leaf, scheme):
            parts = quantized_parts(row.weight, leaf, scheme)
            local = shard_shape(row.shape, row.spec, mesh)
            check_groups(row.weight, parts, row.shape[-1] // local[-1])
            size = row.count * shard_bytes(parts, row.spec, mesh)
        total += size
        if "expert" in row.axes:
            experts += size
        if row.weight == "embed_tokens":
            embedding += size
    return Weights(total, experts, embedding)
