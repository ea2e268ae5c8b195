"""Norm, rotation and routing: their laws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.model.norm import RMSNorm
from mixtral_jax.model.rope import rotate, rotation
from mixtral_jax.model.router import route

F32 = 1e-5


def test_norm_gives_unit_rows_whatever_their_scale():
    norm = RMSNorm(16, eps=1e-12, dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (3, 16))
    np.testing.assert_allclose(jnp.mean(norm(x) ** 2, axis=-1), 1.0, atol=F32)
    np.testing.assert_allclose(norm(100 * x), norm(x), atol=F32)
    assert norm(x.astype(jnp.bfloat16)).dtype == jnp.float32  # an f32 weight promotes
    low = RMSNorm(16, eps=1e-12, dtype=jnp.bfloat16)
    assert low(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(m: int, n: int) -> float:
        turn = [rotation(jnp.asarray([[p]]), head_dim=8, theta=1e4) for p in (m, n)]
        return float((rotate(q, turn[0]) * rotate(k, turn[1])).sum())

    np.testing.assert_allclose(score(3, 7), score(103, 107), atol=1e-4)
    assert abs(score(3, 7) - score(3, 8)) > 1e-3
    far = rotation(jnp.asarray([[32767]]), head_dim=8, theta=1e6)
    np.testing.assert_allclose(jnp.linalg.norm(rotate(q, far)), jnp.linalg.norm(q), rtol=F32)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), top_k=st.integers(1, 8))
def test_routing_weights_sum_to_one_and_experts_differ(seed, top_k):
    logits = 5 * jax.random.normal(jax.random.key(seed), (4, 8))
    routing = route(logits, jnp.ones(4, bool), top_k=top_k)
    np.testing.assert_allclose(routing.expert_weights.sum(axis=-1), 1.0, atol=F32)
    for ids, row in zip(np.asarray(routing.expert_ids), np.asarray(logits), strict=True):
        assert len(set(ids.tolist())) == top_k
        np.testing.assert_array_equal(ids, np.argsort(-row, stable=True)[:top_k])


def test_equal_logits_go_to_the_lowest_experts():
    routing = route(jnp.zeros((2, 8), jnp.bfloat16), jnp.ones(2, bool), top_k=2)
    assert routing.expert_ids.tolist() == [[0, 1], [0, 1]]
    assert routing.expert_weights.tolist() == [[0.5, 0.5], [0.5, 0.5]]
