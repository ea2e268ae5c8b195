"""Bits moved are the rows read and written; no table is widened on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.rows import lookup, lookup_bits, write_rows

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_lookup_and_its_gradient(dtype):
    table = jax.random.normal(jax.random.key(0), (50, 8)).astype(dtype)
    ids = jnp.asarray([[3, 3, 49], [0, 7, 3]])
    np.testing.assert_array_equal(lookup_bits(table, ids), lookup(table, ids))
    got, want = (
        jax.grad(lambda t, f=f: (f(t, ids).astype(jnp.float32) ** 2).sum())(table)
        for f in (lookup_bits, lookup)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_keep_bits_and_leave_padding_out(dtype):
    target = (jnp.arange(16.0).reshape(2, 4, 2) - 8).astype(dtype)
    new = jnp.asarray([[[1.5, -2], [3, 4]], [[5, 6], [7, -0.0]]]).astype(dtype)
    got = write_rows(target, new, jnp.asarray([[2, 4], [1, 0]]))
    want = np.array(target)
    want[0, 2], want[1, 1], want[1, 0] = new[0, 0], new[1, 0], new[1, 1]
    assert got.dtype == target.dtype
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def test_nothing_is_widened():
    """The control: the plain lookup holds the table in f32 while it reads three rows."""
    table = jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((3,), jnp.int32)

    def program(f) -> str:
        return jax.jit(f).lower(table, ids).compile().as_text()

    assert "f32[4096,128]" not in program(lookup_bits)
    if jax.default_backend() == "cpu":
        assert "f32[4096,128]" in program(lookup)
