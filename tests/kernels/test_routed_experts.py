"""Routed experts on stacked weights equal the reference; the Pallas kernels by the interpreter."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.kernels.decode_experts import BLOCK_OUT, block_rows, decode_experts
from mixtral_jax.kernels.experts import ExpertWeights, dense_experts, expert_blocks
from mixtral_jax.kernels.grouped_experts import (
    batched_blocks,
    grouped_dot,
    grouped_experts,
    schedule,
)
from tests.kernels.routings import DTYPES, ROUTINGS, E, assert_close, operands

# Of bf16, where hidden channels are rounded after sums in another order.
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}
ROUTED = {
    "decode": functools.partial(decode_experts, interpret=True, expected=4.0),
    "grouped": functools.partial(grouped_experts, expected=4.0),
}
SCHEDULE = jax.jit(schedule, static_argnames=("num_experts", "block_rows"))
DENSE = jax.jit(functools.partial(dense_experts, expected=4.0))
# Rows, D, F: one row; whole tiles; sizes that no tile divides; several blocks per expert.
SIZES = [(1, 40, 70), (16, 128, 64), (23, 130, 33), (150, 24, 40)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ROUTED)
def test_equals_the_reference(name, size, dtype):
    run = jax.jit(ROUTED[name])
    for routing in ROUTINGS:
        given = operands(routing, *size, dtype=dtype)
        assert_close(run(*given), DENSE(*given), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTED)
def test_gradients_equal_those_of_the_reference(name, dtype):
    def gradients(run):
        def loss(out, x, expert_weights, experts, expert_ids, valid):
            return (run(out, x, expert_ids, expert_weights, valid, experts) ** 2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))

    got, want = gradients(ROUTED[name]), gradients(DENSE)
    for routing in ROUTINGS:
        out, x, ids, shares, valid, experts = operands(routing, 23, 40, 33, dtype)
        given = (out, x, shares, experts, ids, valid)
        assert_close(got(*given), want(*given), 4 * TOLERANCE[dtype])


@pytest.mark.parametrize("leaf", range(3))
def test_an_expert_that_nobody_chose_is_not_read(leaf):
    given = operands("unused", 3, 40, 33, "float32")
    run = jax.jit(ROUTED["decode"])

    def poisoned(expert: int) -> ExpertWeights:
        leaves = list(given.experts)
        leaves[leaf] = leaves[leaf].at[expert].set(jnp.nan)
        return ExpertWeights(*leaves)

    for unused in (0, 2, 4):
        assert_close(run(*given[:5], poisoned(unused)), DENSE(*given), TOLERANCE["float32"])
    assert np.isnan(run(*given[:5], poisoned(1))).any()  # and the test can fail


@settings(max_examples=60)
@given(
    ids=st.lists(st.tuples(*[st.integers(-1, 4)] * 2), min_size=40, max_size=40),
    num_valid=st.integers(0, 40),
    rows=st.sampled_from([1, 2, 16]),
)
def test_schedule_gives_each_assignment_a_slot_of_its_expert(ids, num_valid, rows):
    expert_ids, valid = np.array(ids, np.int32), np.arange(len(ids)) < num_valid
    plan = SCHEDULE(jnp.asarray(expert_ids), jnp.asarray(valid), num_experts=4, block_rows=rows)
    goes = valid[:, None] & (expert_ids >= 0) & (expert_ids < 4)
    slots, row_of_slot = np.asarray(plan.slot_of_choice), np.asarray(plan.row_of_slot)
    taken = slots[goes]
    assert len(set(taken)) == len(taken) == (row_of_slot < len(ids)).sum()
    assert (slots[~goes] == len(row_of_slot)).all()
    assert (row_of_slot[taken] == np.nonzero(goes)[0]).all()
    assert (np.asarray(plan.block_expert)[taken // rows] == expert_ids[goes]).all()
    counts = np.bincount(expert_ids[goes], minlength=4)
    assert plan.blocks_of_expert.tolist() == (-(-counts // rows)).tolist()
    used = -(-counts // rows).sum()
    assert (np.asarray(plan.block_expert)[used:] == 4).all()


def test_a_decode_step_is_one_block_per_expert():
    """Each chosen expert is read once: of up to 64 rows none has two blocks."""
    assert [block_rows(n) for n in (1, 16, 17, 64, 500)] == [16, 16, 32, 64, 64]
    for n in (1, 64):
        given = operands("one expert", n, 8, 8, "float32")
        ids = given.expert_ids.at[:, 1].set(0)
        plan = SCHEDULE(ids, given.valid, num_experts=E, block_rows=block_rows(n))
        assert plan.blocks_of_expert.tolist() == [1, 0, 0, 1, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_blocks_equal_the_loop(dtype):
    given = operands("random", 1, 24, 40, dtype)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((E, 9, 24)), dtype)
    assert_close(
        batched_blocks(x, given.experts), expert_blocks(x, given.experts), TOLERANCE[dtype]
    )


def shapes_8x7b(num_rows: int):
    """One layer's operands of 8x7B as shapes."""

    def of(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = (of((num_rows, 2), jnp.int32), of((num_rows, 2), jnp.float32), of((num_rows,), bool))
    experts: list[Any] = [
        of((8, *s), jnp.bfloat16) for s in ((14336, 4096), (14336, 4096), (4096, 14336))
    ]
    x = (num_rows, 4096)
    return of(x, jnp.float32), of(x, jnp.bfloat16), *rows, ExpertWeights(*experts)


@pytest.mark.parametrize(("num_rows", "blocks"), [(1, 2), (32, 9), (512, 23)])
def test_kernels_lower_for_cuda_at_full_size(num_rows, blocks):
    run = jax.jit(functools.partial(decode_experts, expected=4.0))
    lowered = run.trace(*shapes_8x7b(num_rows)).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@__gpu$xla.gpu.triton(") == 2
    for outputs in (14336, 4096):
        assert f"grid_x = {blocks} : i32, grid_y = {outputs // BLOCK_OUT} : i32" in lowered
    made = re.findall(r"-> \(?tensor<([x0-9]+)x[a-z]+[0-9]+>", lowered)
    assert max(math.prod(map(int, sizes.split("x"))) for sizes in made) < 14336 * 4096


def test_the_weight_gradient_never_widens_all_weights():
    """Of grouped_dot; JAX's own gradient of a product with an f32 result, the control, does."""
    x, w = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((64, 32), (4, 48, 32)))
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def own(x, w, sizes):
        return (grouped_dot(x, w, sizes) ** 2).sum()

    def of_jax(x, w, sizes):
        product = jax.lax.ragged_dot(x, w.mT, sizes, preferred_element_type=jnp.float32)
        return (product**2).sum()

    def lowered(loss) -> str:
        program = jax.jit(jax.grad(loss, (0, 1))).trace(x, w, sizes)
        return program.lower(lowering_platforms=("cuda",)).as_text()

    assert "tensor<4x48x32xf32>" not in lowered(own)
    assert "tensor<4x32x48xf32>" in lowered(of_jax)
