"""Packed codes: pack and unpack are inverse, and what they stand for is what the numpy says."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.kernels.contract import contract
from mixtral_jax.qtensor import (
    SCHEMES,
    Nested,
    QTensor,
    dynamic_map,
    inputs_of,
    pack,
    packed_size,
    unpack,
)
from mixtral_jax.weights import expert_matrices

OUT, IN, GROUPS = 6, 192, 3
PACKED = [name for name, row in SCHEMES.items() if row.is_packed]


def draw_codes(scheme: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    if scheme == "fp8":
        return draw.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
    if SCHEMES[scheme].is_coded:  # so many zeros as fit
        return draw.choice([-1, 0, 1], shape, p=(0.03, 0.94, 0.03)).astype(np.int8)
    low, high = (-127, 128) if scheme == "int8" else (0, 2 ** SCHEMES[scheme].bits)
    return draw.integers(low, high, shape).astype(np.int8 if scheme == "int8" else np.uint8)


def random_qtensor(scheme: str, stack: tuple[int, ...] = (), seed: int = 0, **parts) -> QTensor:
    draw = np.random.default_rng(seed + 1)
    codes = pack(scheme, draw_codes(scheme, (*stack, OUT, IN), seed))
    row = SCHEMES[scheme]
    groups = GROUPS if row.is_packed and not row.is_coded else 1
    scales = draw.uniform(0.5, 2, (*stack, OUT, groups)).astype(np.float32)
    tensor = QTensor(codes, scales, scheme, jnp.float32, **parts)
    return jax.tree.map(jnp.asarray, tensor)


def values_by_hand(q: QTensor) -> np.ndarray:
    """One matrix, code by code; tests/test_ternary_code.py decodes coded rows by hand."""
    row = SCHEMES[q.scheme]
    codes = unpack(q.scheme, np.asarray(q.codes)) if row.is_coded else np.asarray(q.codes)
    scales = np.asarray(q.scales, np.float32)
    values = np.zeros((OUT, IN), np.float32)
    table = np.asarray(row.table or (), np.float32)
    for o in range(OUT):
        is_number = not row.is_packed or row.is_coded
        bits = "" if is_number else "".join(f"{byte:08b}"[::-1] for byte in codes[o])
        for j in range(IN):
            if is_number:
                value = np.float32(codes[o, j])
            elif row.high_first:
                value = table[(codes[o, j // 2] >> (4 if j % 2 == 0 else 0)) & 15]
            else:
                code = int(bits[j * row.bits : (j + 1) * row.bits][::-1], 2)
                group = j * GROUPS // IN
                zero = row.zero if q.zeros is None else int(q.zeros[o, group])
                value = code - zero
            column = j if q.order is None else int(q.order[j])
            values[o, column] = np.float32(value) * scales[o, j * scales.shape[1] // IN]
    return values


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_unpack_undoes_pack(scheme, convert):
    codes = convert(draw_codes(scheme, (3, OUT, IN)))
    # Rows are coded on the host only.
    packed = convert(pack(scheme, np.asarray(codes))) if SCHEMES[scheme].is_coded else None
    packed = pack(scheme, codes) if packed is None else packed
    assert packed.shape == (3, OUT, packed_size(scheme, IN))
    assert packed.dtype == jnp.dtype(SCHEMES[scheme].storage)
    row = SCHEMES[scheme]
    assert packed.shape[-1] * 8 == IN * row.bits or not row.is_packed or row.is_coded
    assert inputs_of(scheme, packed.shape[-1]) == IN
    np.testing.assert_array_equal(unpack(scheme, packed), codes)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("is_ordered", [False, True], ids=["in order", "activation order"])
def test_dequantize_equals_the_table_code_by_code(scheme, is_ordered):
    draw = np.random.default_rng(5)
    order = jnp.asarray(draw.permutation(IN).astype(np.int32)) if is_ordered else None
    q = random_qtensor(scheme, order=order)
    assert (q.shape, q.ndim) == ((OUT, IN), 2)
    np.testing.assert_array_equal(jax.jit(QTensor.dequantize)(q), values_by_hand(q))
    half = dataclasses.replace(q, dtype=jnp.bfloat16).dequantize()
    np.testing.assert_array_equal(half, values_by_hand(q).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("scheme", ["int4", "gptq2", "gptq3", "gptq4", "gptq8"])
def test_zero_points_are_subtracted_group_by_group(scheme):
    zeros = jnp.asarray(draw_codes(scheme, (OUT, GROUPS), seed=9))
    q = random_qtensor(scheme, zeros=zeros)
    np.testing.assert_array_equal(q.dequantize(), values_by_hand(q))
    assert not np.array_equal(q.dequantize(), dataclasses.replace(q, zeros=None).dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("is_ordered", [False, True], ids=["in order", "activation order"])
def test_products_and_stacks_equal_the_dequantized(scheme, is_ordered):
    draw = np.random.default_rng(7)
    order = np.stack([draw.permutation(IN) for _ in range(3)]).astype(np.int32)
    stack = random_qtensor(scheme, (3,), order=jnp.asarray(order) if is_ordered else None)
    x = jnp.asarray(draw.normal(size=(5, IN)).astype(np.float32))
    want = jnp.einsum("NI,EOI->ENO", x, stack.dequantize(), precision="highest")
    got = jnp.stack([contract("NI,OI->NO", x, one) for one in expert_matrices(stack)])
    np.testing.assert_allclose(got, want, atol=1e-3, rtol=1e-5)


def test_nested_scales_follow_their_formula():
    draw = np.random.default_rng(2)
    outputs, groups = 100, 7  # 700 scales: three blocks, the last of 188
    codes = draw.integers(0, 256, (2, outputs, groups)).astype(np.uint8)
    absmax = draw.uniform(1, 2, (2, 3)).astype(np.float32)
    offset = draw.uniform(1, 2, (2,)).astype(np.float32)
    want = np.empty(codes.shape, np.float32)
    for e in range(2):
        for i, code in enumerate(codes[e].ravel()):
            value = dynamic_map()[code] * absmax[e, i // 256] + offset[e]
            want[e].reshape(-1)[i] = value
    nested = Nested(*map(jnp.asarray, (codes, absmax, offset)))
    assert nested.shape == codes.shape
    np.testing.assert_allclose(nested.values(), want, rtol=1e-6)


def test_the_dynamic_map_is_symmetric_but_for_one():
    table = dynamic_map()
    assert table.shape == (256,)
    assert table[-1] == 1
    np.testing.assert_array_equal(table[:-1], -table[:-1][::-1])
    assert (np.diff(table) > 0).all()


@pytest.mark.parametrize("scheme", ["int4", "nf4", "gptq2", "gptq3"])
def test_inputs_that_do_not_fill_bytes_are_refused(scheme):
    with pytest.raises(ValueError, match=f"{scheme} packs multiples of"):
        pack(scheme, np.zeros((2, 9), np.uint8))


def test_every_part_counts():
    q = random_qtensor("int4", zeros=jnp.zeros((OUT, GROUPS), jnp.uint8))
    assert q.nbytes == OUT * IN // 2 + OUT * GROUPS * 4 + OUT * GROUPS
