"""The rows of the table compute the same; each asks for a layout; Pallas stays out until used."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels import accelerator
from mixtral_jax.kernels.decode_experts import decode_experts
from mixtral_jax.kernels.experts import ExpertWeights, dense_experts
from mixtral_jax.kernels.flash_attention import flash_attention
from mixtral_jax.kernels.table import KERNELS, cache_dtype, kernels_for
from mixtral_jax.model.placement import LocalPlacement
from mixtral_jax.sharding.dispatch import DispatchOptions, dispatch
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.weights import Adapted, QTensor, slots_of
from tests.kernels.routings import E, assert_close, operands
from tests.models import forward, random_model, random_tokens
from tests.sharding.test_dispatch import DENSE, F32, experts, rows


def test_rows_by_platform():
    names = {p: kernels_for(p) for p in ("cpu", "gpu", "cuda", "rocm", "tpu", "other")}
    assert names == {
        **dict.fromkeys(("cpu", "other"), "visit"),
        **dict.fromkeys(("gpu", "cuda", "rocm"), "gpu"),
        "tpu": "tpu",
    }
    layouts = {name: row.layout for name, row in KERNELS.items()}
    slots, stacked = ("reference", "dense", "visit"), ("gpu", "tpu")
    assert layouts == dict.fromkeys(slots, "slots") | dict.fromkeys(stacked, "stacked")


def test_what_the_cache_holds():
    held = {name: cache_dtype(name, None, "bfloat16") for name in KERNELS}
    assert held == dict.fromkeys(KERNELS, jnp.bfloat16) | {"visit": jnp.float32}
    assert cache_dtype("visit", None, "float32") == jnp.float32
    assert cache_dtype("visit", "int8", "bfloat16") == jnp.int8


def test_the_table_comes_without_pallas():
    program = (
        "import sys, mixtral_jax.language_model; print('jax.experimental.pallas' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "False"


def int8(w: jax.Array) -> QTensor:
    scales = jnp.abs(w).max(axis=-1, keepdims=True) / 127
    return QTensor(jnp.round(w / scales).astype(jnp.int8), scales, "int8", w.dtype)


def adapted(w: jax.Array) -> Adapted:
    a, b = jnp.ones((E, 2, w.shape[2]), w.dtype), jnp.ones((E, w.shape[1], 2), w.dtype)
    return Adapted(w, a / 8, b / 8, 0.5)


KINDS = {"slots": lambda w: slots_of(w, 1), "int8": int8, "adapted": adapted}
KINDS["wider"] = lambda w: w.astype(jnp.float32)  # than the rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_any_kind_of_weight_passes_through_every_row(name, kind):
    given = operands("random", 9, 24, 40, "bfloat16")
    weights = ExpertWeights(*map(KINDS[kind], given.experts))
    routed = functools.partial(KERNELS[name].routed_experts, expected=4.0)
    want = jax.jit(functools.partial(dense_experts, expected=4.0))(*given[:5], weights)
    assert_close(jax.jit(routed)(*given[:5], weights), want, 4e-3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((E, 4, 24)), "bfloat16")
    got, want = (jax.jit(KERNELS[row].expert_blocks)(x, weights) for row in (name, "reference"))
    assert_close(got, want, 4e-3)


def test_the_number_of_rows_chooses(monkeypatch):
    """Few rows lower to Pallas, more to grouped products."""
    run = jax.jit(functools.partial(KERNELS["gpu"].routed_experts, expected=4.0))

    def lowered(num_rows: int) -> tuple[int, int]:
        given = operands("random", num_rows, 16, 16, "bfloat16")
        text = run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("xla.gpu.triton"), text.count('"chlo.ragged_dot"')

    assert lowered(accelerator.FEW_ROWS) == (2, 0)
    assert lowered(accelerator.FEW_ROWS + 1) == (0, 3)


MORE = ["all_to_all_once", "ragged", "gathered"]
METHODS = ["all_to_all", "replicated", *(pytest.param(m, marks=pytest.mark.slow) for m in MORE)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_rows_of_the_table_on_a_mesh(monkeypatch, name, method):
    """Grouped products on every device, and their gradients; see test_lowering.py for Pallas."""
    monkeypatch.setattr(accelerator, "FEW_ROWS", 0)
    mesh, options = MeshSpec.parse("2x2x2").build(), DispatchOptions(method=method)
    x, routing = rows()
    send = functools.partial(dispatch, mesh=mesh, options=options, kernels=KERNELS[name])

    def both(send):
        def loss(x, weights):
            y = send(x, routing, weights).y
            return (y**2).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, experts())

    got, want = both(send), both(DENSE.experts)
    np.testing.assert_allclose(got[1], want[1], atol=F32)
    assert_close(got[0], want[0], 1e-5)


def test_a_model_by_interpreted_kernels(monkeypatch, small_config):
    """Prefill of a whole model through both Pallas files, as a GPU would run it."""
    row = dataclasses.replace(
        KERNELS["gpu"],
        attention=functools.partial(flash_attention, interpret=True),
        routed_experts=functools.partial(decode_experts, interpret=True),
    )
    monkeypatch.setitem(KERNELS, "interpreted", row)
    model = random_model(small_config(initializer_range=0.15))
    tokens = random_tokens(model.config, (2, 24))
    got = forward(model, tokens, placement=LocalPlacement("interpreted"))
    np.testing.assert_allclose(got, forward(model, tokens), atol=2e-4)
