"""Bits moved are the rows read and written; no table is widened on the way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.rows import lookup, lookup_in_place, write_rows

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"]


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_lookup_and_its_gradient(dtype):
    table = jax.random.normal(jax.random.key(0), (50, 8)).astype(dtype)
    ids = jnp.asarray([[3, 3, 49], [0, 7, 3]])
    np.testing.assert_array_equal(lookup_in_place(table, ids), lookup(table, ids))
    got, want = (
        jax.grad(lambda t, f=f: (f(t, ids).astype(jnp.float32) ** 2).sum())(table)
        for f in (lookup_in_place, lookup)
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_keep_bits_and_leave_padding_out(dtype, axis):
    target = (jnp.arange(16.0).reshape(2, 4, 2) - 8).astype(dtype)
    new = jnp.asarray([[[1.5, -2], [3, 4]], [[5, 6], [7, -0.0]]]).astype(dtype)
    slots = jnp.asarray([[2, 4], [1, 0]])
    heads = (lambda x: x) if axis == 1 else (lambda x: jnp.stack([x, x[::-1]], axis=1))
    got = write_rows(heads(target), heads(new), slots, axis)
    got = got if axis == 1 else got[:, 0]  # the other head has the other row's numbers
    want = np.array(target)
    want[0, 2], want[1, 1], want[1, 0] = new[0, 0], new[1, 0], new[1, 1]
    assert got.dtype == target.dtype
    np.testing.assert_array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def test_a_loop_widens_no_table():
    """The control: the plain lookup's table is made f32 before the loop."""
    table = jax.ShapeDtypeStruct((4096, 128), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((3,), jnp.int32)

    def temporaries(f) -> int:
        def loop(table: jax.Array, ids: jax.Array) -> jax.Array:
            body = lambda i, ids: ids + f(table, ids).sum(axis=1).astype(jnp.int32) + i  # noqa: E731
            return jax.lax.fori_loop(0, 9, body, ids)

        memory = jax.jit(loop).lower(table, ids).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    assert temporaries(lookup_in_place) < 2**16
    if jax.default_backend() == "cpu":
        assert temporaries(lookup) > 2**16
