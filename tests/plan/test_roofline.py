"""FLOPs are those of the products in the programs; experts visited are those of real routings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.config import PRESETS
from mixtral_jax.decode import steps
from mixtral_jax.decode.sampling import SamplingOptions, row_sampling
from mixtral_jax.model.transformer import assemble
from mixtral_jax.plan.devices import DEVICES, send_bandwidth
from mixtral_jax.plan.programs import Workload, _leaves, _placement, state_shapes
from mixtral_jax.plan.roofline import expert_rows, experts_visited, step_work
from mixtral_jax.plan.schemes import weight_bytes
from mixtral_jax.plan.step import generation_steps, traffic_of
from mixtral_jax.sharding.dispatch import DispatchOptions
from mixtral_jax.sharding.mesh import MeshSpec


def product_flops(jaxpr, devices: int) -> float:
    """FLOPs of the products of one device: those in shard_map are its own, others are shared."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((summed, _), _), left = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
            inner = math.prod(left[i] for i in summed)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * inner / devices
        here = 1 if eqn.primitive.name == "shard_map" else devices
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner_jaxpr = getattr(value, "jaxpr", value)
            if hasattr(inner_jaxpr, "eqns"):
                total += product_flops(inner_jaxpr, here)
    return total


@pytest.mark.parametrize(
    ("mesh", "method"), [("1x1", "replicated"), ("1x2", "all_to_all"), ("2x2", "all_to_all")]
)
@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_flops_are_those_of_the_program(small_config, mesh, method, name):
    # Two experts, both chosen: `visit` has one branch with products, so each is counted once.
    fields = {"num_local_experts": 2} if method == "replicated" else {}
    config = small_config(**fields)
    work = Workload(
        config=config,
        mesh=MeshSpec.parse(mesh),
        batch=8,
        context=64,
        dtype="float32",
        dispatch=DispatchOptions(
            method=method,
            overflow="exact" if method == "replicated" else "drop",
            capacity_factor=1.0,
        ),
    )
    placement = _placement(work)
    model, state = assemble(config, _leaves(work, placement)), state_shapes(work)
    if name == "prefill":
        shapes = (work.rows, work.chunk), (work.rows,)
        arguments = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    else:
        rows = row_sampling([SamplingOptions()] * 8, [0] * 8, config.vocab_size)
        limits = steps.Limits(np.ones(8, np.int32), np.zeros(8, bool), np.array([2], np.int32))
        arguments = [rows, limits, np.int32(1)]
    program = {"prefill": steps.prefill, "decode": steps.decode_step}[name]
    run = functools.partial(inspect.unwrap(program), placement=placement)
    jaxpr = jax.make_jaxpr(run)(model, state, *arguments)
    length = work.chunk if name == "prefill" else 1
    sizes = {"weight_bytes": 0, "expert_bytes": 0, "cache_bytes": 0}
    # Traced, prefill still has the experts of its last layer; compiled it has not.
    found = step_work(work, length=length, heads=name == "decode", **sizes).flops
    if name == "prefill":
        all_layers = step_work(work, length=length, heads=True, **sizes).flops
        logits = 2 * work.rows * config.hidden_size * config.vocab_size / work.mesh.num_devices
        assert found < all_layers - logits
        found = all_layers - logits
    assert found == product_flops(jaxpr.jaxpr, work.mesh.num_devices)


def test_experts_visited():
    def visited(mesh: str, tokens: int) -> float:
        work = Workload(config=PRESETS["mixtral-8x7b"], mesh=MeshSpec.parse(mesh))
        return experts_visited(work, tokens)

    assert visited("1x1", 1) == pytest.approx(2)
    assert visited("1x1", 8) == pytest.approx(7.2, abs=0.01)
    assert visited("1x8", 1) == 1  # some device has to read its only expert
    assert visited("1x8", 500) == 1
    # Two devices of four experts: both of a token's two on one of them in 3 of 7 routings.
    assert visited("1x2", 1) == pytest.approx(1 + 3 / 7, abs=0.05)
    assert visited("1x2", 500) == 4


@pytest.mark.parametrize("method", ["all_to_all", "all_to_all_once", "ragged", "gathered"])
@pytest.mark.parametrize("mesh", ["1x8", "1x4", "2x4x2"])
@pytest.mark.parametrize("factor", [0.25, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("chunks", [1, 3])
def test_no_more_is_useful_than_is_done(method, mesh, factor, chunks):
    options = DispatchOptions(method=method, capacity_factor=factor, chunks=chunks)
    config, spec = PRESETS["mixtral-8x7b"], MeshSpec.parse(mesh)
    work = Workload(config=config, mesh=spec, batch=16, dispatch=options)
    sizes = {"weight_bytes": 0, "expert_bytes": 0, "cache_bytes": 0}
    found = step_work(work, length=512, heads=False, **sizes)
    assert 0 < found.useful_flops <= found.flops
    assert found.useful_flops > 0.15 * found.flops


@pytest.mark.parametrize("method", ["all_to_all_once", "ragged"])
def test_the_rows_that_arrive_take_the_branch_with_room_for_them(method):
    """At 1x8 a device sees a quarter of the rows, all of them for its expert."""
    options = DispatchOptions(method=method, capacity_factor=2.0)
    work = Workload(
        config=PRESETS["mixtral-8x7b"], mesh=MeshSpec(expert=8), batch=8, dispatch=options
    )
    rows = 8 * 4096
    computed, _ = expert_rows(work, rows, rows)
    assert rows / 4 < computed < 1.55 * rows / 4  # of rows / 2 that have room


def test_groups_that_leave_the_host_are_sent_over_the_network():
    gpu, tpu = DEVICES["h100"], DEVICES["v5e"]
    inside, outside = MeshSpec(data=8, expert=8), MeshSpec(data=8, expert=8, tensor=4)

    def bandwidth(device, mesh, *axes):
        return send_bandwidth(device, mesh.group(*axes)[1])

    assert bandwidth(gpu, inside, "expert") == gpu.link_bandwidth
    assert bandwidth(gpu, inside, "data") == gpu.network_bandwidth
    assert bandwidth(gpu, inside, "data", "expert") == gpu.network_bandwidth
    assert bandwidth(gpu, outside, "expert") == gpu.network_bandwidth
    assert bandwidth(gpu, outside, "tensor") == gpu.link_bandwidth
    assert bandwidth(tpu, outside, "expert") == tpu.link_bandwidth


def test_rows_that_go_back_in_two_steps_stay_in_the_host():
    """Groups of two and of four that the mesh has no axis for: they are parts of expert's eight."""
    work = Workload(
        config=PRESETS["mixtral-8x7b"],
        mesh=MeshSpec(data=4, expert=8),
        batch=8,
        dispatch=DispatchOptions(method="all_to_all"),
    )
    gathers = [c for c in traffic_of(work, 2)["prefill"].common if c.kind == "all-gather"]
    assert {each.group_size for each in gathers} >= {2, 4}
    assert all(each.span <= 8 for each in gathers)
    assert {send_bandwidth(DEVICES["h100"], each.span) for each in gathers} == {450e9}


@pytest.mark.parametrize("method", ["all_to_all", "all_to_all_once", "ragged"])
@pytest.mark.parametrize("mesh", ["1x8", "2x4"])
def test_a_capacity_that_cannot_hold_the_rows_is_no_speed_up(method, mesh):
    """Under "exact" such a layer takes the gathered path whatever the routing."""
    work = Workload(config=PRESETS["mixtral-8x7b"], mesh=MeshSpec.parse(mesh), batch=64)
    steps = {}
    for factor in (0.25, 1.0, 2.0):
        dispatch = DispatchOptions(method=method, capacity_factor=factor)
        here = dataclasses.replace(work, dispatch=dispatch)
        weights = weight_bytes(work.config, work.mesh, work.strategy)
        steps[factor] = generation_steps(here, DEVICES["h100"], weights, 0)["prefill"]
    small, fair, default = steps.values()
    assert [step.branch for step in steps.values()] == ["overflow", "capacity", "capacity"]
    assert small.step_seconds == default.overflow_step_seconds == fair.overflow_step_seconds
    assert small.step_seconds > fair.step_seconds
    assert small.useful_flops <= small.flops
    kinds = {each.kind for each in small.collectives}
    assert "reduce-scatter" in kinds
    assert not any(kind.endswith("all-to-all") for kind in kinds)
    assert small.overflow == []
    assert any(each.kind == "reduce-scatter" for each in default.overflow)


@pytest.mark.parametrize(("method", "share"), [("all_to_all", 0.95), ("all_to_all_once", 0.4)])
def test_dropping_is_allowed_to_be_fast(method, share):
    dispatch = DispatchOptions(method=method, capacity_factor=0.25, overflow="drop")
    config = PRESETS["mixtral-8x7b"]
    work = Workload(config=config, mesh=MeshSpec(expert=8), batch=64, dispatch=dispatch)
    weights = weight_bytes(config, work.mesh, work.strategy)
    step = generation_steps(work, DEVICES["h100"], weights, 0)["prefill"]
    assert step.branch == "only"
    assert share * step.flops < step.useful_flops <= step.flops
