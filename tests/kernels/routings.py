"""Rows, routings and experts on which every routed kernel is compared with its reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.experts import ExpertWeights

E, A = 5, 2  # experts held here, and chosen per row

# Both dtypes of a matrix of cases; the second in `make slow`.
DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]


class Operands(NamedTuple):
    """Arguments of a routed kernel, in order."""

    out: Any
    x: Any
    expert_ids: Any
    expert_weights: Any
    valid: Any
    experts: ExpertWeights


def ids_of(routing: str, num_rows: int) -> np.ndarray:
    """Expert ids ``[N, A]``; those of ``elsewhere`` lie partly before and partly past the stack."""
    draw = np.random.default_rng(num_rows)
    if routing == "one expert":
        return np.full((num_rows, A), 3, np.int32)
    if routing == "unused":  # experts 0, 2 and 4 have no row
        return np.tile(np.array([[3, 1]], np.int32), (num_rows, 1))
    ids = np.stack([draw.permutation(E)[:A] for _ in range(num_rows)]).astype(np.int32)
    return (ids * 3 - 4) if routing == "elsewhere" else ids


ROUTINGS = ("random", "one expert", "unused", "elsewhere", "padding", "nobody")


def operands(routing: str, num_rows: int, D: int, F: int, dtype: str) -> Operands:
    """Random operands; ``out`` is not zero, so that adding to it is tested too."""
    draw = np.random.default_rng(D + F)

    def normal(*shape: int, std: float = 1.0) -> np.ndarray:
        return draw.standard_normal(shape, np.float32) * std

    valid = np.ones(num_rows, bool)
    if routing == "padding":
        valid = np.arange(num_rows) % 3 != 1
    elif routing == "nobody":
        valid[:] = False
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    experts = [jnp.asarray(normal(*shape, std=shape[-1] ** -0.5), dtype) for shape in shapes]
    return Operands(
        jnp.asarray(normal(num_rows, D)),
        jnp.asarray(normal(num_rows, D), dtype),
        jnp.asarray(ids_of(routing, num_rows)),
        jnp.asarray(draw.random((num_rows, A), np.float32)),
        jnp.asarray(valid),
        ExpertWeights(*experts),
    )


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Every leaf by its norm; NaN never passes."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        a, b = (np.asarray(each, np.float32) for each in (one, other))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-30
