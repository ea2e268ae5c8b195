"""Every strategy computes what one device does: logits and gradients, whatever divides or not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.model.stats import router_stats
from mixtral_jax.model.transformer import Mixtral
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import gather_weights, place
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.strategy import Strategy
from tests.models import REFERENCE, random_model, random_tokens

STRATEGIES = [
    Strategy(),
    Strategy(attention="tensor"),
    Strategy(fsdp=True),
    Strategy(attention="tensor", fsdp=True),
]
# Experts, mesh, dispatch, and a batch that need not divide the expert axis.
CASES = [
    (16, "1x8", "all_to_all", (3, 7)),
    (16, "2x4", "all_to_all_once", (6, 5)),
    (8, "1x4", "all_to_all_once", (5, 6)),
    (8, "2x4", "all_to_all", (4, 9)),
    (8, "2x2x2", "ragged", (2, 11)),
    (8, "4x2", "gathered", (8, 3)),
    (4, "1x8", "all_to_all", (3, 8)),
    (4, "2x4", "replicated", (2, 5)),
]


@functools.cache
def model_of(num_experts: int) -> Mixtral:
    from mixtral_jax.config import ModelConfig

    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=4,
        num_local_experts=num_experts,
        initializer_range=0.3,
        max_position_embeddings=64,
        rope_theta=1e4,
        dtype="float32",
    )
    return random_model(config)


def loss(model: Mixtral, tokens: jax.Array, placement) -> tuple[jax.Array, jax.Array]:
    logits = model(tokens, placement=placement)
    logs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean(), logits


@functools.cache
def expected(num_experts: int, shape: tuple[int, int]):
    model = model_of(num_experts)
    run = jax.jit(jax.value_and_grad(functools.partial(loss, placement=REFERENCE), has_aux=True))
    (_, logits), gradient = run(model, random_tokens(model.config, shape))
    return np.asarray(logits), gradient


def pairs() -> list:
    """Every other case under one strategy; all with all are slow."""
    return [
        pytest.param(*case, strategy, marks=[] if i == 2 * k else [pytest.mark.slow])
        for i, case in enumerate(CASES)
        for k, strategy in enumerate(STRATEGIES)
    ]


@pytest.mark.parametrize(("num_experts", "text", "method", "shape", "strategy"), pairs(), ids=str)
def test_logits_and_gradients_equal_one_device(num_experts, text, method, shape, strategy):
    model = model_of(num_experts)
    spec = MeshSpec.parse(text).fit(model.config)
    strategy.check(model.config, spec)
    mesh = spec.build()
    placement = MeshPlacement(mesh, DispatchOptions(method=method), strategy=strategy)

    def on_mesh(model, tokens):
        return loss(gather_weights(model, mesh, strategy), tokens, placement)

    placed = place(model, mesh, strategy=strategy, layout="stacked")
    tokens = random_tokens(model.config, shape)
    (_, logits), gradient = jax.jit(jax.value_and_grad(on_mesh, has_aux=True))(placed, tokens)
    want_logits, want = expected(num_experts, shape)
    np.testing.assert_allclose(logits, want_logits, atol=1e-4)
    for got, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(want), strict=True):
        scale = float(np.abs(wanted).max())
        np.testing.assert_allclose(got, wanted, atol=1e-3 * scale, rtol=0)
        assert scale > 0


def test_gradients_of_fsdp_lie_where_the_weights_rest():
    model, spec = model_of(8), MeshSpec.parse("2x4")
    mesh, strategy = spec.build(), Strategy(fsdp=True)
    placement = MeshPlacement(mesh, strategy=strategy)
    placed = place(model, mesh, strategy=strategy, layout="stacked")

    def value(model, tokens):
        return loss(gather_weights(model, mesh, strategy), tokens, placement)[0]

    rest = jax.tree.map(lambda w: w.sharding, placed)
    tokens = random_tokens(model.config, (4, 8))
    gradient = jax.jit(jax.grad(value), out_shardings=rest)(placed, tokens)
    for w, g in zip(jax.tree.leaves(placed), jax.tree.leaves(gradient), strict=True):
        assert g.sharding.is_equivalent_to(w.sharding, w.ndim)
    gate = placed.layers[0].moe.experts.gate[...]
    assert gate.addressable_shards[0].data.shape == (2, 64, 16)


@pytest.mark.parametrize("text", ["1x1", "2x4"])
def test_router_statistics_are_those_of_numpy(text):
    model, mesh = model_of(8), MeshSpec.parse(text).build()
    options = DispatchOptions(method="all_to_all", capacity_factor=0.5, overflow="drop")
    placement = MeshPlacement(mesh, options)
    tokens = jnp.asarray(random_tokens(model.config, (4, 16)))
    valid = np.arange(16)[None, :] < np.array([16, 3, 9, 16])[:, None]

    @jax.jit
    def run(model):
        hidden = model.hidden(tokens, jnp.asarray(valid), placement=placement)
        return router_stats(hidden), hidden.router_logits, hidden.routing, hidden.dropped

    stats, logits, routing, dropped = jax.device_get(run(place(model, mesh)))
    rows = valid.reshape(-1)
    for layer in range(1):
        ids = routing[layer].expert_ids[rows]
        assert stats.load[layer].tolist() == np.bincount(ids.reshape(-1), minlength=8).tolist()
        p = np.exp(logits[layer][rows] - logits[layer][rows].max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        np.testing.assert_allclose(stats.entropy[layer], -(p * np.log(p)).sum(-1).mean(), rtol=1e-5)
        assert stats.drop_rate[layer] == pytest.approx(dropped[layer] / (2 * rows.sum()))
        assert stats.overflow_rate[layer] == stats.drop_rate[layer] > 0


@pytest.mark.parametrize(
    ("strategy", "text"),
    [(Strategy(attention="tensor"), "1x16"), (Strategy(fsdp=True), "3x4")],
)
def test_refuses_a_mesh_that_does_not_divide(strategy, text):
    with pytest.raises(MixtralError) as caught:
        strategy.check(model_of(16).config, MeshSpec.parse(text))
    assert caught.value.code == BAD_CONFIG
    given = "--fsdp" if strategy.fsdp else "--attention data"
    assert given in str(caught.value).split("; fix: ")[1]  # and nothing that is set already
