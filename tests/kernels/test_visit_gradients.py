"""Gradients of ``visit_experts`` are those of the reference, in every layout, trained or frozen."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mixtral_jax.kernels.experts import ExpertWeights, dense_experts, visit_experts
from mixtral_jax.weights import Adapted, ExpertSlots, slots_of
from tests.kernels.routings import DTYPES, ROUTINGS, A, E, assert_close, operands

N, D, F, R = 96, 24, 40, 3
EXPECTED = N * A / E


def factors(experts: ExpertWeights) -> list[tuple[jax.Array, jax.Array]]:
    """``A`` and ``B`` of every matrix, neither of them zero."""
    pairs = []
    for i, (_, out, summed) in enumerate(w.shape for w in experts):
        a, b = jax.random.split(jax.random.key(i))
        pairs.append((jax.random.normal(a, (E, R, summed)), jax.random.normal(b, (E, out, R))))
    return [(a / a.shape[-1] ** 0.5, b / R**0.5) for a, b in pairs]


def laid_out(layout: str, experts: Any, pairs: Any) -> ExpertWeights:
    if layout == "factors":
        adapted = [Adapted(w, a, b, 2.0) for w, (a, b) in zip(experts, pairs, strict=True)]
        return ExpertWeights(*adapted)
    if layout == "factors in slots":

        def one(e: int, w: Any, a: Any, b: Any) -> Adapted:
            return Adapted(w[e : e + 1], a[e : e + 1], b[e : e + 1], 2.0)

        slots = [
            ExpertSlots(tuple(one(e, w, a, b) for e in range(E)))
            for w, (a, b) in zip(experts, pairs, strict=True)
        ]
        return ExpertWeights(*slots)
    return ExpertWeights(*(slots_of(w, 1) if layout == "slots" else w for w in experts))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["stacked", "slots", "factors", "factors in slots"])
def test_gradients_equal_those_of_the_reference(layout, dtype):
    def gradients(run):
        def loss(out, x, shares, trained, frozen, ids, valid):
            experts, pairs = (frozen, trained) if "factors" in layout else (trained, frozen)
            weights = laid_out(layout, experts, pairs)
            return (run(out, x, ids, shares, valid, weights, expected=EXPECTED) ** 2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))

    got, want = gradients(visit_experts), gradients(dense_experts)
    for routing in ROUTINGS:
        out, x, ids, shares, valid, experts = operands(routing, N, D, F, dtype)
        parts = (experts, factors(experts))
        trained, frozen = parts[::-1] if "factors" in layout else parts
        given = (out, x, shares, trained, frozen, ids, valid)
        assert_close(got(*given), want(*given), 1e-5 if dtype == "float32" else 2e-2)


def test_frozen_weights_get_no_gradient_and_branches_keep_nothing():
    """The backward pass holds no array of a frozen matrix's size beside the matrices themselves,
    and the forward one hands over nothing with the hidden width."""
    out, x, ids, shares, valid, experts = operands("random", N, D, F, "float32")

    def loss(trained: Any, experts: Any) -> jax.Array:
        weights = laid_out("factors", experts, trained)
        return visit_experts(out, x, ids, shares, valid, weights, expected=EXPECTED).sum()

    pairs = factors(experts)
    _, backward = jax.vjp(functools.partial(loss, experts=experts), pairs)
    kept = [leaf.shape for leaf in jax.tree.leaves(backward) if hasattr(leaf, "shape")]
    allowed = {leaf.shape for leaf in jax.tree.leaves((out, x, shares, experts, pairs))}
    allowed |= {(N, E), (E,), ()}
    assert set(kept) <= allowed, set(kept) - allowed

    def control(trained: Any) -> jax.Array:  # what JAX keeps by itself
        weights = laid_out("factors", experts, trained)
        return dense_experts(out, x, ids, shares, valid, weights, expected=EXPECTED).sum()

    _, plain = jax.vjp(control, pairs)
    assert any(F in leaf.shape and N in leaf.shape for leaf in jax.tree.leaves(plain))


def test_an_expert_that_nobody_chose_has_gradients_of_zero():
    out, x, ids, shares, valid, experts = operands("unused", N, D, F, "float32")

    def loss(experts: Any) -> jax.Array:
        return visit_experts(out, x, ids, shares, valid, experts, expected=EXPECTED).sum()

    for gradient in jax.grad(loss)(experts):
        sizes = jnp.abs(gradient).max(axis=(1, 2))
        assert (sizes[jnp.array([0, 2, 4])] == 0).all()
        assert (sizes[jnp.array([1, 3])] > 0).all()
