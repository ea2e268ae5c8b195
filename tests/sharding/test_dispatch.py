"""Expert dispatch: every method on every mesh gives the dense result, its drops and gradients."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.model.placement import LocalPlacement, Routing
from mixtral_jax.model.router import route
from mixtral_jax.sharding.dispatch import REPLICATED_BELOW, DispatchOptions, choose, dispatch
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.per_expert import assign_slots, capacity
from mixtral_jax.weights import slots_of
from tests.reference.dispatch import dropped, kept
from tests.slow import in_turn

E, A, D, F, N = 8, 2, 16, 32, 56
F32 = 2e-5
MESHES = ["2x4", "1x4x2"]  # test_model.py has them all
EXACT = [
    DispatchOptions(method="all_to_all", capacity_factor=4.0),
    DispatchOptions(method="all_to_all", capacity_factor=0.5),  # overflows
    DispatchOptions(method="all_to_all", chunks=2),
    DispatchOptions(method="all_to_all_once"),
    DispatchOptions(method="all_to_all_once", capacity_factor=0.5, chunks=2),
    DispatchOptions(method="ragged"),
    DispatchOptions(method="ragged", capacity_factor=0.5),  # overflows
    DispatchOptions(method="gathered"),
    DispatchOptions(method="replicated"),
    DispatchOptions(),
]
DENSE = LocalPlacement("reference")


def names(value: Any) -> str:
    """Of a test: options, options and a skew, or a mesh."""
    if isinstance(value, tuple):
        return f"{names(value[0])}-skew {value[1]}"
    if isinstance(value, DispatchOptions):
        return f"{value.method}-{value.capacity_factor}-{value.overflow}-{value.chunks}"
    return value


def experts(seed: int = 0) -> ExpertWeights:
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((E, F, D), (E, F, D), (E, D, F))
    arrays = (jax.random.normal(k, s) / math.sqrt(s[-1]) for k, s in zip(keys, shapes, strict=True))
    return ExpertWeights(*arrays)


def rows(num_rows: int = N, *, skew: float = 0.0, seed: int = 1) -> tuple[jax.Array, Routing]:
    """Random rows, some of them padding; ``skew`` sends them to expert 0 first."""
    keys = jax.random.split(jax.random.key(seed), 2)
    logits = jax.random.normal(keys[0], (num_rows, E)).at[:, 0].add(skew)
    valid = jnp.arange(num_rows) % 7 != 3
    return jax.random.normal(keys[1], (num_rows, D)), route(logits, valid, top_k=A)


@functools.partial(jax.jit, static_argnames=("mesh", "options"))
def on_mesh(x, routing, weights, *, mesh, options) -> Any:
    kernels = KERNELS["visit"]
    return dispatch(x, routing, weights, mesh=mesh, options=options, kernels=kernels)


# Skewed, every capacity overflows; small ones do without.
SKEWED = [options for options in EXACT if options.capacity_factor >= 2 and options.chunks == 1]


LOADS = [(options, 0.0) for options in EXACT] + [(options, 20.0) for options in SKEWED]


@pytest.mark.parametrize(("load", "text"), in_turn(LOADS, MESHES), ids=names)
def test_equals_dense_and_drops_nothing(text, load):
    options, skew = load
    spec, weights = MeshSpec.parse(text), experts()
    x, routing = rows(skew=skew)
    slots = ExpertWeights(*(slots_of(w, spec.expert) for w in weights))
    got = on_mesh(x, routing, slots, mesh=spec.build(), options=options)
    np.testing.assert_allclose(got.y, DENSE.experts(x, routing, weights).y, atol=F32)
    assert got.dropped == 0
    assert not np.asarray(got.y)[~np.asarray(routing.valid)].any()


def test_rows_that_do_not_divide_the_mesh():
    x, routing = rows(37)
    want = DENSE.experts(x, routing, experts()).y
    for options in (options for options in EXACT if options.capacity_factor == 2):
        got = on_mesh(x, routing, experts(), mesh=MeshSpec.parse("2x4").build(), options=options)
        np.testing.assert_allclose(got.y, want, atol=F32)


@pytest.mark.parametrize("text", ["1x1", "1x8", "2x4", "1x4x2"])
def test_reported_drops_equal_a_numpy_count(text):
    spec = MeshSpec.parse(text)
    x, routing = rows(skew=20.0)
    options = DispatchOptions(method="all_to_all", capacity_factor=1.0, overflow="drop")
    got = on_mesh(x, routing, experts(), mesh=spec.build(), options=options)
    counted = dropped(
        np.asarray(routing.expert_ids),
        np.asarray(routing.valid),
        shards=spec.data * spec.expert,
        num_experts=E,
        capacity_factor=1.0,
    )
    assert int(got.dropped) == int(np.sum(counted)) > 0


def test_what_is_dropped_is_missing_and_nothing_else():
    mesh = MeshSpec.parse("1x1").build()
    x, routing = rows(skew=20.0)
    options = DispatchOptions(method="all_to_all", capacity_factor=1.0, overflow="drop")
    got = on_mesh(x, routing, experts(), mesh=mesh, options=options)
    room = capacity(N, A, E, 1.0)
    slots = assign_slots(routing.expert_ids, routing.valid, num_experts=E, room=room)
    kept = np.where(np.asarray(slots.slot_of_choice) < E * room, routing.expert_weights, 0.0)
    want = DENSE.experts(x, routing._replace(expert_weights=jnp.asarray(kept)), experts()).y
    np.testing.assert_allclose(got.y, want, atol=F32)
    assert (kept == 0).sum() - A * (~routing.valid).sum() == got.dropped


DROP = DispatchOptions(method="all_to_all", capacity_factor=1.0, overflow="drop")


# auto is one of the others, and chunks are the same once more.
GRADIENTS = [options for options in EXACT[:-1] if options.chunks == 1]


@pytest.mark.parametrize(
    ("options", "text"), in_turn([*GRADIENTS, DROP], ["1x8", "2x2x2"]), ids=names
)
def test_gradients_equal_dense(text, options):
    spec, weights = MeshSpec.parse(text), experts()
    mesh = spec.build()
    x, routing = rows(skew=3.0)
    stays = np.ones(routing.expert_ids.shape, bool)
    if options.overflow == "drop":
        ids, valid = np.asarray(routing.expert_ids), np.asarray(routing.valid)
        shards = spec.data * spec.expert
        stays = kept(ids, valid, shards=shards, num_experts=E, capacity_factor=1.0)
        assert not stays[valid].all()

    def as_slots(weights: ExpertWeights) -> ExpertWeights:
        return ExpertWeights(*(slots_of(w, spec.expert) for w in weights))

    def loss(x, share, weights, run):
        return (run(x, routing._replace(expert_weights=share), weights) ** 2).sum()

    def mesh_run(x, routing, weights):
        return on_mesh(x, routing, weights, mesh=mesh, options=options).y

    def dense_run(x, routing, weights):
        share = jnp.where(stays, routing.expert_weights, 0.0)
        return DENSE.experts(x, routing._replace(expert_weights=share), weights).y

    grad = jax.grad(loss, argnums=(0, 1, 2))
    share = routing.expert_weights
    got = jax.jit(functools.partial(grad, run=mesh_run))(x, share, as_slots(weights))
    of_x, of_share, of_weights = grad(x, share, weights, dense_run)
    want = (of_x, of_share, as_slots(of_weights))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("skew", [0.0, 20.0])
def test_the_visiting_kernel_equals_the_reference(skew):
    x, routing = rows(skew=skew)
    got = LocalPlacement("visit").experts(x, routing, experts()).y
    np.testing.assert_allclose(got, DENSE.experts(x, routing, experts()).y, atol=F32)


@settings(max_examples=15)
@given(
    ids=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    room=st.integers(1, 4),
)
def test_slots_are_first_come_first_served(ids, room):
    num_rows = 13  # whatever is drawn: each number would be compiled
    both = jnp.asarray([(i, (i + 1) % 4) for i in ids] + [(0, 1)] * (num_rows - len(ids)))
    valid = jnp.arange(num_rows) < len(ids)
    slots = assign_slots(both, valid, num_experts=4, room=room)
    taken, dropped = {e: [] for e in range(4)}, 0
    for choice in range(2):
        for row in range(len(ids)):
            expert = int(both[row, choice])
            if len(taken[expert]) < room:
                taken[expert].append(row)
            else:
                dropped += 1
    want = [row for e in range(4) for row in taken[e] + [num_rows] * (room - len(taken[e]))]
    assert slots.row_of_slot.tolist() == want
    assert int(slots.dropped) == dropped
    assert (np.asarray(slots.slot_of_choice)[len(ids) :] == 4 * room).all()


def test_the_rule_that_chooses():
    wide, one = MeshSpec.parse("1x8").build(), MeshSpec.parse("8x1").build()
    auto = DispatchOptions()
    assert choose(auto, one, 10**6) == "replicated"
    assert choose(auto, wide, 8 * REPLICATED_BELOW - 1) == "replicated"
    assert choose(auto, wide, 8 * REPLICATED_BELOW) == "all_to_all"
    assert choose(DispatchOptions(method="gathered"), wide, 1) == "gathered"


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "gathered", "overflow": "drop"},
        {"method": "replicated", "overflow": "drop"},
    ],
)
def test_refuses_other_options(fields):
    with pytest.raises(MixtralError) as caught:
        DispatchOptions(**fields)
    assert caught.value.code == USAGE


@pytest.mark.parametrize(("factor", "room"), [(1.0, 16), (1.01, 17), (4.0, 64), (1e308, 64)])
def test_capacity_is_a_share_of_the_rows(factor, room):
    assert capacity(64, 2, 8, factor) == room


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_a_capacity_factor(factor):
    with pytest.raises(MixtralError) as caught:
        DispatchOptions(capacity_factor=factor)
    assert caught.value.code == USAGE
