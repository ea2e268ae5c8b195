"""Gradients of ``visit_experts`` are those of the reference, in every layout, trained or frozen."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.experts import ExpertWeights, dense_experts, visit_experts
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.model.placement import Routing
from mixtral_jax.sharding.dispatch import DispatchOptions, dispatch
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.weights import Adapted, ExpertSlots, slots_of
from tests.kernels.quantized import in_codes
from tests.kernels.routings import DTYPES, ROUTINGS, A, E, assert_close, operands
from tests.slow import mostly_slow

D, F, R = 64, 128, 3
LAYOUTS = ["stacked", "slots", "factors", "factors in slots", "factors on nf4"]
# Rows, and how many of them an expert is thought to have: branches of several kinds, one branch
# for all rows, and few rows, whose experts are summed side by side.
SIZES = [(96, 96 * A / E), (96, 96.0), (23, 23 * A / E), (3, 1.0)]


def factors(experts: ExpertWeights) -> list[tuple[jax.Array, jax.Array]]:
    """``A`` and ``B`` of every matrix, neither of them zero."""
    pairs = []
    for i, (_, out, summed) in enumerate(w.shape for w in experts):
        a, b = jax.random.split(jax.random.key(i))
        pairs.append((jax.random.normal(a, (E, R, summed)), jax.random.normal(b, (E, out, R))))
    return [(a / a.shape[-1] ** 0.5, b / R**0.5) for a, b in pairs]


def laid_out(layout: str, experts: Any, pairs: Any) -> ExpertWeights:
    if layout in ("factors", "factors on nf4"):
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


def loss_of(run: Any, layout: str, expected: float) -> Any:
    """Of ``out, x, shares, trained``; trained are experts or their factors."""

    def loss(out, x, shares, trained, frozen, ids, valid):
        experts, pairs = (frozen, trained) if "factors" in layout else (trained, frozen)
        weights = laid_out(layout, experts, pairs)
        return (run(out, x, ids, shares, valid, weights, expected=expected) ** 2).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", mostly_slow(SIZES, [SIZES[0]]), ids=str)
@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, LAYOUTS[1:4:2]))
def test_gradients_equal_those_of_the_reference(layout, size, dtype):
    num_rows, expected = size
    got, want = (loss_of(run, layout, expected) for run in (visit_experts, dense_experts))
    for routing in ROUTINGS:
        out, x, ids, shares, valid, experts = operands(routing, num_rows, D, F, dtype)
        pairs = factors(experts)
        if layout == "factors on nf4":
            experts = ExpertWeights(*(in_codes("nf4", np.asarray(w, np.float32)) for w in experts))
        trained, frozen = (pairs, experts) if "factors" in layout else (experts, pairs)
        given = (out, x, shares, trained, frozen, ids, valid)
        assert_close(got(*given), want(*given), 1e-5 if dtype == "float32" else 2e-2)


def test_what_is_asked_for_in_between_changes_nothing():
    """Gradients of all, of rows alone, of one matrix, and of all again, at one shape."""
    out, x, ids, shares, valid, experts = operands("random", 17, D, F, "float32")

    def gradients(run: Any, *argnums: int) -> Any:
        def loss(x, gate, up, down):
            weights = ExpertWeights(gate, up, down)
            return (run(out, x, ids, shares, valid, weights, expected=17 * A / E) ** 2).sum()

        return jax.jit(jax.grad(loss, argnums=argnums))(x, *experts)

    for argnums in ((0, 1, 2, 3), (0,), (0, 1, 2, 3), (2,), (0, 3), (0, 1, 2, 3)):
        got, want = (gradients(run, *argnums) for run in (visit_experts, dense_experts))
        assert_close(got, want, 1e-5)


def test_several_experts_in_a_slot():
    """As where one device holds slots of several shards: expert e is row e // n of slot e % n."""
    out, x, ids, shares, valid, experts = operands("random", 40, D, F, "float32")
    stacks: list[Any] = [*experts]
    experts = ExpertWeights(*(jnp.concatenate([w, w[:1]]) for w in stacks))  # 6 of them

    def gradient(lay: Any) -> Any:
        def loss(experts: Any) -> jax.Array:
            weights = ExpertWeights(*map(lay, experts))
            return (visit_experts(out, x, ids, shares, valid, weights, expected=16.0) ** 2).sum()

        return jax.jit(jax.grad(loss))(experts)

    got, want = gradient(lambda w: slots_of(w, 2)), gradient(lambda w: w)
    assert_close(got, want, 1e-6)


def test_dropout_of_factors_is_drawn_alike_in_both_passes():
    """By differences: what the backward pass drops must be what the forward pass dropped."""
    out, x, ids, shares, valid, experts = operands("random", 23, D, F, "float32")
    pairs = factors(experts)

    def loss(b: jax.Array) -> jax.Array:
        keys = jnp.stack([jax.random.key(e) for e in range(E)])
        down = Adapted(experts.down, pairs[2][0], b, 2.0, keys, 0.5)
        weights = ExpertWeights(experts.gate, experts.up, down)
        return visit_experts(out, x, ids, shares, valid, weights, expected=23 * A / E).sum()

    b = pairs[2][1]
    step = jnp.zeros_like(b).at[3, :4].set(1.0)
    # The loss is linear in B.
    np.testing.assert_allclose(
        float((jax.grad(loss)(b) * step).sum()), float(loss(b + step) - loss(b)), rtol=1e-3
    )


def test_branches_keep_nothing_and_frozen_weights_get_no_gradient():
    out, x, ids, shares, valid, experts = operands("random", 96, D, F, "float32")

    def loss(trained: Any, run: Any) -> jax.Array:
        weights = laid_out("factors", experts, trained)
        return run(out, x, ids, shares, valid, weights, expected=96 * A / E).sum()

    def kept(run: Any) -> list[tuple[int, ...]]:
        _, backward = jax.vjp(functools.partial(loss, run=run), factors(experts))
        return [leaf.shape for leaf in jax.tree.leaves(backward) if hasattr(leaf, "shape")]

    def is_hidden(shape: tuple[int, ...]) -> bool:
        return 96 in shape and F in shape

    assert not any(map(is_hidden, kept(visit_experts)))
    assert any(map(is_hidden, kept(dense_experts)))  # what JAX keeps by itself

    def made(trained_too: bool) -> set[tuple[int, ...]]:
        """Shapes that conditionals of the gradient's program give."""

        def both(pairs: Any, experts: Any) -> jax.Array:
            weights = laid_out("factors", experts, pairs)
            return visit_experts(out, x, ids, shares, valid, weights, expected=96 * A / E).sum()

        program = jax.make_jaxpr(jax.grad(both, argnums=(0, 1) if trained_too else 0))
        shapes = set()
        for eqn in program(factors(experts), experts).jaxpr.eqns:
            if eqn.primitive.name == "cond":
                shapes |= {v.aval.shape for v in eqn.outvars}
        return shapes

    assert (F, R) in made(False)
    assert not {(F, D), (D, F), (E, F, D)} & made(False)
    assert (F, D) in made(True)  # and the test can fail


def test_an_expert_that_nobody_chose_has_gradients_of_zero():
    out, x, ids, shares, valid, experts = operands("unused", 96, D, F, "float32")

    def loss(experts: Any) -> jax.Array:
        return visit_experts(out, x, ids, shares, valid, experts, expected=96 * A / E).sum()

    for gradient in jax.grad(loss)(experts):
        sizes = jnp.abs(gradient).max(axis=(1, 2))
        assert (sizes[jnp.array([0, 2, 4])] == 0).all()
        assert (sizes[jnp.array([1, 3])] > 0).all()


@pytest.mark.parametrize("is_jitted", mostly_slow([False, True], [True]))
def test_factors_on_a_mesh_with_a_tensor_axis(is_jitted):
    """A factor may lie whole along an axis that splits its matrix."""
    mesh = MeshSpec.parse("1x2x2").build()
    draw = iter(jax.random.split(jax.random.key(0), 20))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(draw), shape) / shape[-1] ** 0.5

    shapes = ((4, F, D), (4, F, D), (4, D, F))
    experts = [normal(*shape) for shape in shapes]
    pairs = [(normal(e, R, i), normal(e, o, R)) for e, o, i in shapes]
    x = jax.random.normal(next(draw), (24, D))
    ids = jnp.stack([jnp.arange(24) % 4, (jnp.arange(24) + 1) % 4], axis=1).astype(jnp.int32)
    weights = jax.random.uniform(next(draw), (24, 2))
    routing = Routing(ids, weights, jnp.ones((24,), bool))

    def loss(pairs: Any, run: Any) -> jax.Array:
        adapted = [Adapted(w, a, b, 2.0) for w, (a, b) in zip(experts, pairs, strict=True)]
        return (run(ExpertWeights(*adapted)) ** 2).sum()

    def on_mesh(adapted: ExpertWeights) -> jax.Array:
        options = DispatchOptions(method="replicated")
        return dispatch(x, routing, adapted, mesh=mesh, options=options, kernels=KERNELS["visit"]).y

    def alone(adapted: ExpertWeights) -> jax.Array:
        parts: Any = (jnp.zeros((24, D)), x, ids, weights, routing.valid, adapted)
        return dense_experts(*parts, expected=12.0)

    gradient = jax.grad(functools.partial(loss, run=on_mesh))
    got = (jax.jit(gradient) if is_jitted else gradient)(pairs)
    assert_close(got, jax.grad(functools.partial(loss, run=alone))(pairs), 1e-5)
