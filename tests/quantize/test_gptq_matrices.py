"""Matrices on their way to few bits: what calibration text cannot tell does not end the work."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.convert.names import Chunk
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.quantize.gptq_matrices import NewMatrices
from mixtral_jax.quantize.gptq_recipe import GptqRecipe

CHUNK = Chunk("layers.3.moe.experts.up", 5)


def matrices(damp: float, notes: list[str]) -> NewMatrices:
    w = np.random.default_rng(0).normal(size=(16, 128)).astype(np.float32)
    recipe = GptqRecipe(group=32, damp=damp)
    return NewMatrices(lambda chunk: w, recipe, lambda: None, notes.append)


def hessian(rows: int):
    x = np.random.default_rng(1).normal(size=(rows, 128))
    return jnp.asarray(2 * x.T @ x, jnp.float32)


def test_a_hessian_of_few_rows_is_damped_more_and_that_is_told():
    few, notes = hessian(3), []
    made = matrices(1e-9, notes)
    w = made.matrix(CHUNK, lambda: few)
    assert notes == ["layers.3.moe.experts.up[5]: its Hessian needed --damp 0.0001 to be factored"]
    same = matrices(1e-4, plain := [])
    np.testing.assert_array_equal(w, same.matrix(CHUNK, lambda: few))
    assert plain == []


def test_a_hessian_that_no_damping_mends_is_refused():
    with pytest.raises(MixtralError, match=r"up\[5\]: the Hessian .* overflow") as refusal:
        matrices(0.1, []).matrix(CHUNK, lambda: hessian(3) * jnp.inf)
    assert refusal.value.code == BAD_DATA
