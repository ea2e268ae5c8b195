"""The code that the CPU tests run, on a GPU: same routing, same logits, same greedy tokens."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.kernels.attention import attends, attention
from mixtral_jax.kernels.decode_experts import decode_experts
from mixtral_jax.kernels.experts import dense_experts
from mixtral_jax.kernels.flash_attention import flash_attention
from mixtral_jax.kernels.grouped_experts import grouped_experts
from mixtral_jax.kernels.quantized_experts import quantized_experts
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from tests.kernels.quantized import GPTQ, RECIPES, quantized_operands
from tests.kernels.routings import ROUTINGS, E, assert_close, operands
from tests.kernels.test_attention import operands as attention_operands
from tests.model.test_transformer import from_reference
from tests.models import forward, random_tokens
from tests.reference import mixtral as reference

pytestmark = pytest.mark.gpu

F32 = 1e-3  # sums in another order than numpy's


@pytest.fixture(autouse=True)
def _on_a_gpu():
    assert jax.default_backend() == "gpu", "run with MIXTRAL_JAX_TEST_PLATFORM=cuda"


def test_logits_equal_the_numpy_reference():
    raw, weights, model = from_reference({"initializer_range": 0.15})
    tokens = random_tokens(model.config, (2, 64))
    want = reference.forward(weights, raw, tokens).logits
    np.testing.assert_allclose(forward(model, tokens, placement=LOCAL), want, atol=F32)


ROUTED = {"decode": decode_experts, "grouped": grouped_experts}
KERNEL_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCE)
@pytest.mark.parametrize("size", [(1, 40, 70), (16, 256, 512), (23, 130, 33), (600, 128, 96)])
@pytest.mark.parametrize("name", ROUTED)
def test_routed_kernels_equal_the_reference(name, size, dtype):
    """And so do their gradients."""

    def loss(run):
        def both(out, x, shares, experts, ids, valid):
            y = run(out, x, ids, shares, valid, experts, expected=ids.size / E)
            return (y**2).sum(), y

        return jax.jit(jax.grad(both, argnums=(0, 1, 2, 3), has_aux=True))

    got, want = loss(ROUTED[name]), loss(dense_experts)
    for routing in ROUTINGS:
        out, x, ids, shares, valid, experts = operands(routing, *size, dtype=dtype)
        given = (out, x, shares, experts, ids, valid)
        assert_close(got(*given), want(*given), 4 * KERNEL_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCE)
@pytest.mark.parametrize("size", [(1, 128, 384), (23, 256, 128), (600, 128, 256)])
@pytest.mark.parametrize("name", [*RECIPES, *GPTQ])
def test_kernels_in_packed_codes_equal_dequantize_then_multiply(name, size, dtype):
    run, want = (
        jax.jit(functools.partial(f, expected=4.0)) for f in (quantized_experts, dense_experts)
    )
    for routing in ROUTINGS:
        given = quantized_operands(name, routing, *size, dtype=dtype)
        assert_close(run(*given), want(*given), 4 * KERNEL_TOLERANCE[dtype])


@pytest.mark.parametrize("scheme", ["int8", "fp8", "int4", "nf4"])
def test_quantized_rows_of_the_table_generate_the_same(scheme):
    got, want = (mj.load("tiny", quantize=scheme, kernels=name) for name in ("gpu", "reference"))
    asked: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0}
    got, want = (lm.generate(["The red house"], **asked)[0].token_ids for lm in (got, want))
    assert got == want


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCE)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    "size", [(2, 1, 3000, 8, 2, 128), (1, 200, 520, 8, 2, 128), (2, 37, 211, 6, 2, 24)]
)
def test_attention_kernel_equals_the_reference(size, window, dtype):
    given = attention_operands(*size, dtype=dtype)
    sees = attends(*given[3:], window).any(axis=-1)
    got = jax.jit(functools.partial(flash_attention, window=window))(*given)
    want = attention(*given, window=window)
    assert_close(got[sees], want[sees], KERNEL_TOLERANCE[dtype])


@pytest.mark.parametrize("kernels", ["visit", "gpu"])
def test_rows_of_the_table_generate_the_same(kernels):
    """Prefill and decode of the embedded model, f32, by a row and by the reference."""
    got, want = (mj.load("tiny", kernels=name) for name in (kernels, "reference"))
    tokens = [want.encode("The red house is")]
    np.testing.assert_allclose(got.logits(tokens), want.logits(tokens), atol=F32)
    asked: dict[str, Any] = {"max_new_tokens": 40, "temperature": 0}
    got, want = (lm.generate(["The red house"], **asked)[0].token_ids for lm in (got, want))
    assert got == want


@pytest.mark.parametrize("kernels", ["visit", "gpu"])
@pytest.mark.parametrize("method", ["all_to_all", "gathered", "replicated"])
def test_every_dispatch_on_all_gpus(method, kernels):
    _, _, model = from_reference({"initializer_range": 0.15})
    experts = model.config.num_local_experts
    size = max(n for n in (1, 2, 4, 8) if n <= len(jax.devices()) and experts % n == 0)
    mesh = MeshSpec(expert=size).build()
    tokens = random_tokens(model.config, (2, 64))
    placement = MeshPlacement(mesh, DispatchOptions(method=method), kernels)
    placed = place(model, mesh, layout=KERNELS[kernels].layout)
    got = forward(placed, tokens, placement=placement)
    np.testing.assert_allclose(got, forward(model, tokens, placement=LOCAL), atol=F32)


def test_the_embedded_model_generates():
    lm = mj.load("tiny")
    whole = lm.generate(["The red house"], max_new_tokens=40)[0]
    scored = lm.logits([whole.prompt_token_ids + whole.token_ids])[0]
    logprobs = np.asarray(jax.nn.log_softmax(scored))
    where = np.arange(len(whole.token_ids)) + len(whole.prompt_token_ids) - 1
    np.testing.assert_allclose(logprobs[where, whole.token_ids], whole.logprobs, atol=F32)
