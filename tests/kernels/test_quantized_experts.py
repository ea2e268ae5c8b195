"""Experts in packed codes: the fused kernels equal dequantize-then-multiply, and make no weight."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.decode_experts import BLOCK_OUT
from mixtral_jax.kernels.experts import ExpertWeights, dense_experts, expert_blocks
from mixtral_jax.kernels.quantized_experts import quantized_blocks, quantized_experts
from mixtral_jax.kernels.row_experts import FEW_ROWS, cpu_routed_experts, row_experts
from mixtral_jax.qtensor import SCHEMES, QTensor, packed_size
from mixtral_jax.weights import expert_matrices
from tests.decode.test_no_copies import made
from tests.kernels.quantized import SCHEME_CASES, quantized_operands
from tests.kernels.routings import DTYPES, ROUTINGS, E, assert_close
from tests.slow import mostly_slow

TOLERANCE = {"float32": 2e-6, "bfloat16": 6e-3}
DENSE = jax.jit(functools.partial(dense_experts, expected=4.0))
PALLAS = functools.partial(quantized_experts, expected=4.0, interpret=True)
KERNELS = {"gpu": PALLAS, "cpu": row_experts}
# Rows, D, F: one row; whole tiles; sizes that no tile divides.
SIZES = mostly_slow([(5, 128, 256), (1, 128, 384), (23, 256, 128), (5, 384, 640)], [(5, 128, 256)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SCHEME_CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_dequantize_then_multiply(kernel, name, size, dtype):
    run = jax.jit(KERNELS[kernel])
    for routing in ROUTINGS:
        given = quantized_operands(name, routing, *size, dtype=dtype)
        assert_close(run(*given), DENSE(*given), TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_of_no_whole_tile(kernel):
    """33 and 70 inputs: no vector, group or tile divides them."""
    run = jax.jit(KERNELS[kernel])
    for name in ("int8", "fp8"):
        given = quantized_operands(name, "random", 3, 33, 70, "float32")
        assert_close(run(*given), DENSE(*given), TOLERANCE["float32"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_are_those_of_the_reference(kernel):
    given = quantized_operands("int4 asymmetric", "random", 5, 64, 128, "float32")
    out, x, ids, shares, valid, experts = given

    def gradients(run):
        def loss(out, x, shares):
            return (run(out, x, ids, shares, valid, experts) ** 2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(out, x, shares)

    assert_close(gradients(KERNELS[kernel]), gradients(DENSE), 1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expert_that_nobody_chose_is_not_read(kernel):
    given = quantized_operands("int8", "unused", 3, 40, 33, "float32")
    run = jax.jit(KERNELS[kernel])

    def poisoned(expert: int) -> ExpertWeights:
        gate = given.experts.gate
        assert isinstance(gate, QTensor)
        scales = gate.scales.at[expert].set(jnp.nan)
        return given.experts._replace(gate=dataclasses.replace(gate, scales=scales))

    for unused in (0, 2, 4):
        assert_close(run(*given[:5], poisoned(unused)), DENSE(*given), TOLERANCE["float32"])
    assert np.isnan(run(*given[:5], poisoned(1))).any()


def test_a_row_does_not_depend_on_those_beside_it():
    given = quantized_operands("int4", "random", FEW_ROWS, 128, 256, "bfloat16")
    out, x, ids, shares, valid, experts = given
    whole = jax.jit(row_experts)(*given)
    for row in range(FEW_ROWS):
        one = [part[row : row + 1] for part in (out, x, ids, shares, valid)]
        np.testing.assert_array_equal(jax.jit(row_experts)(*one, experts)[0], whole[row])


def test_the_number_of_rows_chooses_on_a_cpu():
    run = jax.jit(functools.partial(cpu_routed_experts, expected=4.0))
    for num_rows, is_loop in ((FEW_ROWS, True), (FEW_ROWS + 1, False)):
        given = quantized_operands("nf4", "random", num_rows, 64, 64, "float32")
        text = run.trace(*given).lower().as_text()
        assert ("stablehlo.while" in text) == is_loop
        assert ("stablehlo.case" in text) != is_loop
        assert_close(run(*given), DENSE(*given), TOLERANCE["float32"])


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8"])
def test_the_cpu_makes_no_weight(name):
    """No array as large as an expert's matrix in the compiled program, but the codes themselves."""
    D, F = 256, 512
    given = quantized_operands(name, "random", 2, D, F, "bfloat16")
    text = jax.jit(row_experts).lower(*given).compile().as_text() or ""
    entry = text[text.index("ENTRY") :] + "".join(
        part for part in text.split("\n\n") if "get-tuple-element" in part
    )
    made = re.findall(
        r"= (?:f32|bf16|u8|s8|f8e4m3fn)\[([0-9,]+)\]\S* (?:fusion|copy|convert)\(", entry
    )
    assert made
    assert max(math.prod(map(int, sizes.split(","))) for sizes in made) < D * F
    assert "conditional" not in text


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_many_rows_copy_no_codes(name):
    """Experts leave their stack where they run, not all of them in every step."""
    D, F, num_rows = 256, 512, 4 * FEW_ROWS
    given = quantized_operands(name, "random", num_rows, D, F, "bfloat16")
    run = functools.partial(cpu_routed_experts, expected=2 * num_rows / E)
    gate: Any = given.experts.gate

    def copies(run) -> list[str]:
        text = jax.jit(run).lower(*given).compile().as_text() or ""
        return [x for x in made(text, gate.codes.size // E) if x.startswith(("u8", "s8"))]

    assert copies(run) == []

    def taken_first(*operands):
        matrices: list[Any] = expert_matrices(operands[-1].gate)
        return jnp.stack([w.codes + 1 for w in matrices]), run(*operands)

    assert copies(taken_first), "a planted copy is seen"


@pytest.mark.slow
def test_blocks_equal_the_loop():
    experts = quantized_operands("nf4", "random", 1, 64, 128, "float32").experts
    x = jnp.asarray(np.random.default_rng(0).standard_normal((E, 19, 64)), jnp.float32)
    run = functools.partial(quantized_blocks, interpret=True)
    assert_close(run(x, experts), expert_blocks(x, experts), TOLERANCE["float32"])
    got, want = (
        jax.grad(lambda x, f=f: (f(x, experts) ** 2).sum())(x) for f in (run, expert_blocks)
    )
    assert_close(got, want, 1e-5)


def shapes_8x7b(scheme: str, num_rows: int):
    """One layer's operands of 8x7B as shapes; 4 bits in groups of 64."""

    def of(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def codes(O: int, I: int) -> QTensor:  # noqa: E741
        groups = I // 64 if SCHEMES[scheme].bits == 4 else 1
        return QTensor(
            of(8, O, packed_size(scheme, I), dtype=jnp.dtype(SCHEMES[scheme].storage)),
            of(8, O, groups, dtype=jnp.float32),
            scheme,
            jnp.dtype("bfloat16"),
        )

    return (
        of(num_rows, 4096, dtype=jnp.float32),
        of(num_rows, 4096, dtype=jnp.bfloat16),
        of(num_rows, 2, dtype=jnp.int32),
        of(num_rows, 2, dtype=jnp.float32),
        of(num_rows, dtype=bool),
        ExpertWeights(codes(14336, 4096), codes(14336, 4096), codes(4096, 14336)),
    )


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "fp8"])
@pytest.mark.parametrize(("num_rows", "blocks"), [(1, 2), (32, 9), (2048, 39)])
def test_kernels_lower_for_cuda_at_full_size(name, num_rows, blocks):
    run = jax.jit(functools.partial(quantized_experts, expected=4.0))
    lowered = run.trace(*shapes_8x7b(name, num_rows)).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@__gpu$xla.gpu.triton(") == 2
    for outputs in (14336, 4096):
        assert f"grid_x = {blocks} : i32, grid_y = {outputs // BLOCK_OUT} : i32" in lowered
    made = re.findall(r"-> \(?tensor<([x0-9]+)x[a-z]+[0-9]+>", lowered)
    largest = max(math.prod(map(int, sizes.split("x"))) for sizes in made)
    assert largest < 2 * 14336 * 4096  # of 8: no stack of weights; hidden rows of a prompt are more
