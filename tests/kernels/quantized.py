"""Experts in every scheme whose codes lie within bytes, and rows that they are tried on."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.qtensor import SCHEMES, QTensor, pack
from mixtral_jax.quantize.makers import Recipe, quantize
from tests.kernels.routings import Operands, operands
from tests.slow import mostly_slow

RECIPES = {
    "int8": Recipe(scheme="int8"),
    "fp8": Recipe(scheme="fp8"),
    "int4 of 32": Recipe(scheme="int4", group_size=32),
    "int4": Recipe(scheme="int4", group_size=64),
    "int4 of 128": Recipe(scheme="int4", group_size=128),
    "int4 asymmetric": Recipe(scheme="int4", symmetric=False),
    "nf4": Recipe(scheme="nf4"),
    "nf4 nested": Recipe(scheme="nf4", double_quant=True),
    "fp4": Recipe(scheme="fp4"),
}
GPTQ = ("gptq4", "gptq8", "gptq2", "gptq4 one group")
SCHEME_CASES = mostly_slow(
    [*RECIPES, *GPTQ], ["int8", "fp8", "int4 of 32", "int4 asymmetric", "nf4 nested", "gptq4"]
)


def in_codes(name: str, w: np.ndarray) -> QTensor:
    """A stack ``[E, O, I]`` in a scheme; those of GPTQ in a drawn order of inputs."""
    if name in RECIPES:
        return jax.tree.map(jnp.asarray, quantize(w, RECIPES[name]))
    scheme = name.split(maxsplit=1)[0]
    draw = np.random.default_rng(w.shape[-1])
    top = 2 ** SCHEMES[scheme].bits
    groups = 1 if "one group" in name else w.shape[-1] // 32
    made = QTensor(
        pack(scheme, draw.integers(0, top, w.shape)),
        (draw.random((*w.shape[:-1], groups)) / top / w.shape[-1] ** 0.5).astype(np.float32),
        scheme,
        w.dtype,
        zeros=draw.integers(1, min(top, 16), (*w.shape[:-1], groups)).astype(np.uint8),
        order=np.stack([draw.permutation(w.shape[-1]) for _ in w]).astype(np.int32),
    )
    return jax.tree.map(jnp.asarray, made)


def quantized_operands(
    name: str, routing: str, num_rows: int, D: int, F: int, dtype: str
) -> Operands:
    """``operands`` with experts in codes that stand for weights of the rows' dtype."""
    given = operands(routing, num_rows, D, F, dtype)
    experts: list[Any] = [
        dataclasses.replace(in_codes(name, np.asarray(w, np.float32)), dtype=jnp.dtype(dtype))
        for w in given.experts
    ]
    return given._replace(experts=ExpertWeights(*experts))
