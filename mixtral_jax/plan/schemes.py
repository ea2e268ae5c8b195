"""Sizes of quantized weights, by scheme: what they will take, exact to the scale.

The matrices of attention and experts are quantized; router, norms, embeddings and head are not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.report import shard_shape, weight_report
from mixtral_jax.sharding.strategy import Strategy


class SchemeSize(NamedTuple):
    """Bits of one weight and of what goes with it.

    Attributes:
        bits: of a code.
        group: consecutive inputs that share a scale; None where a whole row does.
        group_bits: of the scale (and zero point) of a group.
        input_bits: of what is kept once per input of a matrix (GPTQ's group index).
    """

    bits: int
    group: int | None
    group_bits: float
    input_bits: int = 0


_NESTED = 8 + 32 / 256  # bitsandbytes: scales in 8 bits, 256 of them under one f32
SCHEMES: dict[str, SchemeSize] = {
    "int8": SchemeSize(8, None, 32),
    "fp8": SchemeSize(8, None, 32),
    "int4": SchemeSize(4, 64, 16),
    "nf4": SchemeSize(4, 64, _NESTED),
    "fp4": SchemeSize(4, 64, _NESTED),
    "gptq": SchemeSize(4, 128, 16 + 4, 32),
}
_QUANTIZED = {"heads", "kv_heads", "mlp"}  # a matrix with one of these axes


def matrix_bytes(shape: tuple[int, ...], scheme: SchemeSize) -> int:
    """Bytes of a stack of matrices ``[..., O, I]``."""
    *stack, inputs = shape
    rows = math.prod(stack)
    groups = 1 if scheme.group is None else -(-inputs // scheme.group)
    matrices = math.prod(stack[:-1])
    codes = rows * (-(-inputs * scheme.bits // 8))
    return (
        codes
        + math.ceil(rows * groups * scheme.group_bits / 8)
        + (matrices * inputs * scheme.input_bits // 8)
    )


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
        MixtralError: exit code 64 for an unknown scheme.
    """
    check_scheme(scheme)
    total = experts = embedding = 0
    itemsize = np.dtype(dtype or config.dtype).itemsize
    for row in weight_report(config, mesh, strategy, dtype):
        size = row.bytes_per_device
        if scheme is not None and _QUANTIZED & set(row.axes):
            local = shard_shape(row.shape, row.spec, mesh)
            assert math.prod(local) * itemsize * row.count == size, row
            size = row.count * matrix_bytes(local, SCHEMES[scheme])
        total += size
        if "expert" in row.axes:
            experts += size
        if row.weight == "embed_tokens":
            embedding += size
    return Weights(total, experts, embedding)
