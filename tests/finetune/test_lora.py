"""Targets, factors, and the models that they make."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.errors import BAD_CONFIG, USAGE, MixtralError
from mixtral_jax.finetune.lora import (
    Pair,
    check_targets,
    first_pair,
    scale_of,
    target_paths,
    with_trained,
)
from mixtral_jax.model.transformer import leaf_specs, leaves_of
from mixtral_jax.weights import slots_of, takes_slots
from tests.models import random_model

TOKENS = jnp.asarray(np.random.default_rng(0).integers(3, 64, (2, 12)), jnp.int32)


@jax.jit
def logits(model):
    return model(TOKENS)


def test_targets_are_the_names_of_published_checkpoints(small_config):
    config = small_config(num_hidden_layers=2)
    assert len(target_paths(config, ["q_proj", "v_proj"])) == 4
    assert target_paths(config, ["experts"]) == target_paths(config, ["w1", "w2", "w3"])
    assert len(target_paths(config, ["all-linear"])) == 2 * (4 + 3 + 1)
    assert target_paths(config, ["gate"]) == (
        "layers.0.moe.router.weight",
        "layers.1.moe.router.weight",
    )
    for names in (["q"], ["gate_proj"], []):
        with pytest.raises(MixtralError, match="lora-target-modules") as caught:
            check_targets(names, 0.0)
        assert caught.value.code == USAGE


def test_scales():
    assert scale_of(16, 32) == 2
    assert scale_of(16, 32, is_stabilized=True) == 8


def test_first_factors_change_nothing_and_depend_on_seed_and_path(small_config):
    specs = leaf_specs(small_config(num_hidden_layers=1))
    path = "layers.0.moe.experts.gate"
    pair = first_pair(specs[path], path, 4, 0)
    E, F, D = specs[path].shape
    assert (pair.a.shape, pair.b.shape) == ((E, 4, D), (E, F, 4))
    assert not pair.b.any()
    assert np.abs(pair.a).max() <= D**-0.5
    assert np.std(pair.a) == pytest.approx(D**-0.5 / 3**0.5, rel=0.05)
    np.testing.assert_array_equal(pair.a, first_pair(specs[path], path, 4, 0).a)
    for other in (first_pair(specs[path], path, 4, 1), first_pair(specs[path], path + "x", 4, 0)):
        assert (pair.a != other.a).any()


@pytest.mark.parametrize("shards", [None, 1, 2])
def test_factors_act_as_the_product_added_to_the_weight(small_config, shards):
    """Experts as one stack, and as slots of one and two expert shards."""
    config = small_config(num_hidden_layers=1, num_local_experts=4)
    frozen = leaves_of(random_model(config))
    rng, trained, merged = np.random.default_rng(1), {}, dict(frozen)
    for path in target_paths(config, ["all-linear"]):
        *stack, out, summed = frozen[path].shape
        pair = Pair(
            jnp.asarray(rng.standard_normal((*stack, 3, summed)) * 0.1, jnp.float32),
            jnp.asarray(rng.standard_normal((*stack, out, 3)) * 0.1, jnp.float32),
        )
        trained[path] = pair
        merged[path] = frozen[path] + 0.5 * pair.b @ pair.a
    if shards is not None:
        frozen = {p: slots_of(w, shards) if takes_slots(w) else w for p, w in frozen.items()}
    got = logits(with_trained(config, frozen, trained, scale=0.5))
    want = logits(with_trained(config, merged, {}, scale=1.0))
    np.testing.assert_allclose(got, want, atol=2e-5)
    plain = logits(with_trained(config, frozen, {}, scale=1.0))
    assert np.abs(got - plain).max() > 1e-2


def test_dropout_drops_what_a_sees_and_keeps_its_mean(small_config):
    config = small_config(num_hidden_layers=1)
    frozen = leaves_of(random_model(config))
    path = "layers.0.attention.o_proj"
    out, summed = frozen[path].shape
    rng = np.random.default_rng(2)
    shapes = (3, summed), (out, 3)
    pair = Pair(*(jnp.asarray(rng.standard_normal(s) * 0.2, jnp.float32) for s in shapes))

    @jax.jit
    def run(key):
        return (
            with_trained(config, frozen, {path: pair}, scale=0.1, dropout=0.5, key=key)
            .hidden(TOKENS)
            .x
        )

    keys = jax.random.split(jax.random.key(0), 100)
    found = jnp.stack([run(key) for key in keys])
    plain = run(None)
    assert (found[0] != found[1]).any()
    np.testing.assert_array_equal(run(keys[0]), found[0])
    apart = np.abs(found.mean(axis=0) - plain).mean()
    assert apart < 0.2 * np.abs(found[0] - plain).mean()


@pytest.mark.parametrize("target", ["w1", "experts", "all-linear"])
def test_experts_take_no_dropout(target):
    check_targets(["q_proj", "gate"], 0.1)
    check_targets([target], 0.0)
    with pytest.raises(MixtralError, match="lora-dropout") as caught:
        check_targets(["q_proj", target], 0.1)
    assert caught.value.code == BAD_CONFIG
