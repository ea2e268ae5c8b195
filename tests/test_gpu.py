"""The code that the CPU tests run, on a GPU: same routing, same logits, same greedy tokens."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
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


@pytest.mark.parametrize("method", ["all_to_all", "gathered", "replicated"])
def test_every_dispatch_on_all_gpus(method):
    _, _, model = from_reference({"initializer_range": 0.15})
    experts = model.config.num_local_experts
    size = max(n for n in (1, 2, 4, 8) if n <= len(jax.devices()) and experts % n == 0)
    mesh = MeshSpec(expert=size).build()
    tokens = random_tokens(model.config, (2, 64))
    placement = MeshPlacement(mesh, DispatchOptions(method=method))
    got = forward(place(model, mesh), tokens, placement=placement)
    np.testing.assert_allclose(got, forward(model, tokens, placement=LOCAL), atol=F32)


def test_the_embedded_model_generates():
    lm = mj.load("tiny")
    whole = lm.generate(["The red house"], max_new_tokens=40)[0]
    scored = lm.logits([whole.prompt_token_ids + whole.token_ids])[0]
    logprobs = np.asarray(jax.nn.log_softmax(scored))
    where = np.arange(len(whole.token_ids)) + len(whole.prompt_token_ids) - 1
    np.testing.assert_allclose(logprobs[where, whole.token_ids], whole.logprobs, atol=F32)
