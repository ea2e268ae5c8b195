"""A row goes once to a device: who visits whom, what is dropped, and what travels."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.kernels.experts import ladder
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.model.placement import LocalPlacement, Routing
from mixtral_jax.sharding.dispatch import DispatchOptions, dispatch
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.per_device import (
    Exchange,
    assign_device_slots,
    device_capacity,
    find_visits,
    visit_share,
)
from tests.sharding.test_dispatch import F32, A, E, N, experts, on_mesh, rows

DENSE = LocalPlacement("reference")


def by_hand(ids: np.ndarray, valid: np.ndarray, *, shards: int, room: int) -> np.ndarray:
    """True where an assignment is kept: first choices of all rows first, a device once per row."""
    local = E // shards
    taken, goes = [0] * shards, {}
    for choice, row in itertools.product(range(A), range(len(ids))):
        device = int(ids[row, choice]) // local
        if valid[row] and (row, device) not in goes:
            goes[row, device] = taken[device] < room
            taken[device] += goes[row, device]
    return np.array(
        [[valid[r] and goes[r, int(e) // local] for e in ids[r]] for r in range(len(ids))]
    )


@settings(max_examples=10)
@given(
    pairs=st.lists(st.permutations(range(E)), min_size=1, max_size=10),
    shards=st.sampled_from([1, 2, 4, 8]),
    room=st.integers(1, 6),
)
def test_slots_are_first_come_first_served(pairs, shards, room):
    # Padded to one number of rows: each would be compiled.
    ids = np.array([p[:A] for p in pairs] + [[0, 1]] * (11 - len(pairs)), np.int32)
    valid = np.arange(len(ids)) < len(pairs)
    slots = assign_device_slots(
        find_visits(jnp.asarray(ids), jnp.asarray(valid), num_experts=E, shards=shards),
        jnp.asarray(ids),
        jnp.asarray(valid),
        num_experts=E,
        room=jnp.full((shards,), room),
        starts=jnp.arange(shards) * room,
        num_slots=shards * room,
    )
    kept = by_hand(ids, valid, shards=shards, room=room)
    assert int(slots.dropped) == int((valid[:, None] & ~kept).sum())
    found = np.asarray(slots.slot_of_choice)
    for row in range(len(ids)):
        devices = {int(e) // (E // shards) for e in ids[row][kept[row]]}
        used = [s for s in found[row] if s < shards * room]
        assert {s // room for s in used} == devices
        assert len(used) == len(devices)
        assert all(int(slots.row_of_slot[s]) == row for s in used)
    taken = np.asarray(slots.row_of_slot) < len(ids)
    assert taken.sum() == (found < shards * room).sum()


@pytest.mark.parametrize("method", ["all_to_all_once", "ragged"])
@pytest.mark.parametrize("text", ["1x4", "2x4", "1x8"])
def test_what_is_dropped_is_missing_and_nothing_else(text, method):
    spec = MeshSpec.parse(text)
    x, routing = rows(skew=20.0)
    options = DispatchOptions(method=method, capacity_factor=0.5, overflow="drop")
    got = on_mesh(x, routing, experts(), mesh=spec.build(), options=options)
    n = N // (spec.data * spec.expert)
    ids, valid = np.asarray(routing.expert_ids), np.asarray(routing.valid)
    room = device_capacity(n, A, num_experts=E, shards=spec.expert, factor=0.5)
    kept = np.zeros((N, A), bool)
    if method == "all_to_all_once":
        for start in range(0, N, n):
            part = slice(start, start + n)
            kept[part] = by_hand(ids[part], valid[part], shards=spec.expert, room=room)
    else:  # a buffer that the sources of one data shard fill in order
        kept = pooled(ids, valid, spec)
    assert int(got.dropped) == int(got.overflowed) == int((valid[:, None] & ~kept).sum()) > 0
    share = jnp.where(kept, routing.expert_weights, 0.0)
    want = DENSE.experts(x, routing._replace(expert_weights=share), experts()).y
    np.testing.assert_allclose(got.y, want, atol=F32)


def pooled(ids: np.ndarray, valid: np.ndarray, spec: MeshSpec) -> np.ndarray:
    """``ragged``: the sources of a data shard fill each device's buffer one after the other."""
    shards, n = spec.expert, N // (spec.data * spec.expert)
    room = device_capacity(n * shards, A, num_experts=E, shards=shards, factor=0.5)
    kept = np.zeros((N, A), bool)
    for group in range(spec.data):
        left = [room] * shards
        for source in range(shards):
            part = slice((group * shards + source) * n, (group * shards + source + 1) * n)
            for device in range(shards):
                there = ids[part] // (E // shards) == device
                order = by_hand(ids[part], valid[part] & there.any(1), shards=shards, room=n)
                first = np.where(there, np.arange(A), A).min(1)
                visits = sorted((first[r], r) for r in range(n) if (order & there)[r].any())
                for _, row in visits[: max(left[device], 0)]:
                    kept[part][row] |= there[row]
                left[device] -= len(visits)
    return kept


@pytest.mark.parametrize("text", ["1x8", "2x4", "1x4x2"])
@pytest.mark.parametrize("method", ["all_to_all_once", "ragged", "gathered", "replicated"])
def test_experts_expect_a_balanced_load_of_what_arrives(text, method):
    """The rows that arrive at a device were chosen for it; the load of its experts is the same."""
    seen = []

    def spy(out, x, *arguments, expected):
        seen.append((x.shape[0], expected))
        return KERNELS["visit"].routed_experts(out, x, *arguments, expected=expected)

    spec = MeshSpec.parse(text)
    kernels = dataclasses.replace(KERNELS["visit"], routed_experts=spy)
    options = DispatchOptions(method=method, capacity_factor=2.0)
    x, routing = rows(8 * N)
    run = functools.partial(dispatch, mesh=spec.build(), options=options, kernels=kernels)
    jax.jit(run).lower(x, routing, experts())
    assert {expected for _, expected in seen} == {8 * N * A / E / spec.data}
    for num_rows, expected in seen:  # room for a balanced load, and less work than all rows are
        assert expected < ladder(num_rows, expected)[-2] < num_rows


def test_overflow_is_reported_where_nothing_is_dropped():
    x, routing = rows(skew=20.0)
    for method in ("all_to_all", "all_to_all_once", "ragged"):
        options = DispatchOptions(method=method, capacity_factor=0.5)
        got = on_mesh(x, routing, experts(), mesh=MeshSpec.parse("1x4").build(), options=options)
        assert got.dropped == 0
        assert got.overflowed > 0
    roomy = DispatchOptions(method="all_to_all_once", capacity_factor=8.0)
    got = on_mesh(x, routing, experts(), mesh=MeshSpec.parse("1x4").build(), options=roomy)
    assert got.overflowed == 0


@pytest.mark.parametrize(("shards", "share"), [(8, 2 / 8), (4, 13 / 28), (2, 22 / 28), (1, 1.0)])
def test_share_of_rows_that_visit_a_device(shards, share):
    pairs = list(itertools.combinations(range(E), A))
    counted = np.mean([any(e // (E // shards) == 0 for e in pair) for pair in pairs])
    assert visit_share(E, shards, A) == pytest.approx(share) == pytest.approx(counted)


def test_capacity_per_device_is_that_per_expert_where_a_device_holds_one():
    for factor in (0.5, 1.0, 2.0, 4.0, 100.0):
        got = device_capacity(64, A, num_experts=E, shards=8, factor=factor)
        assert got == min(64, int(np.ceil(factor * 16)))


def test_an_exchange_is_cut_in_order_of_the_sources():
    wanted = jnp.asarray([[3, 0, 1], [2, 5, 1], [4, 1, 1]])
    assert Exchange.cut(wanted, 4).rows.tolist() == [[3, 0, 1], [1, 4, 1], [0, 0, 1]]
    assert Exchange.cut(wanted, 9).receive_starts.tolist() == [[0, 0, 0], [3, 0, 1], [5, 5, 2]]


@pytest.mark.parametrize("platform", ["cuda"])  # test_lowering.py has both
def test_ragged_lowers_to_the_collective_of_the_backend(platform):
    from jax import export

    mesh = MeshSpec.parse("1x8").build()
    x, routing = rows()

    def both(x, routing, weights):
        def total(x):
            options = DispatchOptions(method="ragged")
            return on_mesh(x, routing, weights, mesh=mesh, options=options).y.sum()

        return jax.value_and_grad(total)(x)

    # jax promises no stability of this call between versions; nothing here is kept.
    unchecked = [export.DisabledSafetyCheck.custom_call("ragged_all_to_all")]
    program = export.export(jax.jit(both), platforms=[platform], disabled_checks=unchecked)
    exported = program(x, Routing(*routing), experts())
    # There and back, each for rows and (there) what goes beside them; and their transposes.
    assert exported.mlir_module().count("ragged_all_to_all") >= 5
