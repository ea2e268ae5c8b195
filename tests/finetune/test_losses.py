"""Losses: known values, masks, and blocks of positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.finetune.losses import (
    POSITIONS_AT_ONCE,
    dpo,
    load_balancing,
    router_z,
    score_tokens,
)
from tests.slow import mostly_slow

RNG = np.random.default_rng(0)
L, N, E, A = 3, 64, 8, 2


def routed(logits: jax.Array) -> jax.Array:
    return jnp.argsort(-logits, axis=-1)[..., :A]


@pytest.mark.parametrize("kind", ["pooled", "per_layer"])
def test_even_routing_gives_the_number_of_experts_per_token(kind):
    ids = jnp.stack([jnp.arange(N) % E, (jnp.arange(N) + 1) % E], axis=1)
    found = load_balancing([jnp.zeros((N, E))] * L, [ids] * L, jnp.ones(N, bool), kind)
    assert found == pytest.approx(A)


def test_one_expert_for_all_is_as_bad_as_it_gets_and_pooling_can_hide_it():
    scores = np.full((E, N, E), -50.0, np.float32)
    for layer in range(E):  # each layer overloads another expert
        scores[layer, :, layer] = 50.0
        scores[layer, :, (layer + 1) % E] = 40.0
    logits = list(jnp.asarray(scores))
    ids = [routed(x) for x in logits]
    valid = jnp.ones(N, bool)
    per_layer = load_balancing(logits, ids, valid, "per_layer")
    pooled = load_balancing(logits, ids, valid, "pooled")
    assert per_layer == pytest.approx(E)
    assert pooled == pytest.approx(A)


@pytest.mark.parametrize("kind", ["pooled", "per_layer"])
def test_padding_counts_nowhere(kind):
    logits = [jnp.asarray(RNG.standard_normal((N, E)), jnp.float32) for _ in range(L)]
    ids = [routed(x) for x in logits]
    valid = jnp.arange(N) < 40
    got = load_balancing(logits, ids, valid, kind), router_z(logits, valid)
    short = [x[:40] for x in logits]
    everything = jnp.ones(40, bool)
    want = (
        load_balancing(short, [i[:40] for i in ids], everything, kind),
        router_z(short, everything),
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert load_balancing(logits, ids, jnp.ones(N, bool), kind) != pytest.approx(float(got[0]))
    assert np.isfinite(load_balancing(logits, ids, jnp.zeros(N, bool), kind))


@pytest.mark.parametrize(
    "length",
    mostly_slow(
        [1, 100, POSITIONS_AT_ONCE + 1, 3 * POSITIONS_AT_ONCE, 2 * POSITIONS_AT_ONCE + 64],
        [100, POSITIONS_AT_ONCE + 1],
    ),
)
def test_blocks_of_positions_change_nothing(length):
    x = jnp.asarray(RNG.standard_normal((2, length, 16)), jnp.float32)
    head = jnp.asarray(RNG.standard_normal((50, 16)), jnp.float32)
    targets = jnp.asarray(RNG.integers(0, 50, (2, length)))

    def scores(x: jax.Array) -> jax.Array:
        return score_tokens(x, targets, lambda part: part @ head.T).logprobs

    def plain(x: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jax.nn.log_softmax(x @ head.T), targets[..., None], -1)[..., 0]

    np.testing.assert_allclose(scores(x), plain(x), atol=1e-5)
    got, want = (jax.grad(lambda x, f=f: f(x).sum())(x) for f in (scores, plain))
    np.testing.assert_allclose(got, want, atol=1e-5)
    best = score_tokens(x, targets, lambda part: part @ head.T).is_best
    np.testing.assert_array_equal(best, (x @ head.T).argmax(-1) == targets)


@pytest.mark.parametrize("length", [1000, 1023, 2000])
def test_no_length_takes_more_memory_than_its_blocks(length):
    """Logits of a block and what its gradient needs, whatever 256 divides."""
    B, D, V = 2, 8, 4000

    def loss(x: jax.Array, head: jax.Array) -> jax.Array:
        targets = jnp.zeros(x.shape[:2], jnp.int32)
        return score_tokens(x, targets, lambda part: part @ head.T).logprobs.sum()

    shapes = (
        jax.ShapeDtypeStruct((B, length, D), jnp.float32),
        jax.ShapeDtypeStruct((V, D), jnp.float32),
    )
    used = jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis()
    assert used is not None
    assert used.temp_size_in_bytes < 4 * B * POSITIONS_AT_ONCE * V * 4


def test_dpo_of_equal_models_is_log_2_and_falls_with_the_margin():
    same = jnp.asarray([-3.0, -5.0, -4.0, -1.0])
    found = dpo(same, same, beta=0.1)
    np.testing.assert_allclose(found.losses, np.log(2), rtol=1e-6)
    better = dpo(same + jnp.asarray([1.0, 0, 0, 0]), same, beta=0.1)
    assert better.losses[0] < np.log(2)
    assert better.margins[0] == pytest.approx(0.1)
    assert better.is_right.tolist() == [True, False]
    smooth = dpo(same + jnp.asarray([1.0, 0, 0, 0]), same, beta=0.1, label_smoothing=0.5)
    assert smooth.losses[0] > np.log(2)


def test_the_reference_of_dpo_has_no_gradient():
    policy = jnp.asarray([-3.0, -5.0])
    gradient = jax.grad(lambda reference: dpo(policy, reference, beta=0.1).losses.sum())(policy)
    np.testing.assert_array_equal(gradient, 0)
