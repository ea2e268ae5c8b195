"""The Pallas attention equals the reference, interpreted; it lowers for CUDA at full size."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.attention import EMPTY, attends, attention
from mixtral_jax.kernels.flash_attention import flash_attention
from tests.kernels.routings import DTYPES, assert_close
from tests.kernels.test_attention import operands

TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}
REFERENCE = jax.jit(attention, static_argnames="window")
INTERPRETED = functools.partial(flash_attention, interpret=True)
# B, T, S, H, K, C: decode of one row and of several, whole tiles, sizes that no tile divides,
# one head per key/value head, one key/value head.
SIZES = [
    (2, 1, 256, 8, 2, 32),
    (3, 1, 301, 4, 1, 16),
    (2, 64, 128, 4, 4, 16),
    (2, 37, 211, 6, 2, 24),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_the_reference(size, window, dtype):
    given = operands(*size, dtype=dtype)
    got = jax.jit(functools.partial(INTERPRETED, window=window))(*given)
    want = REFERENCE(*given, window=window)
    sees = attends(*given[3:], window).any(axis=-1)
    assert sees.any()
    assert_close(got[sees], want[sees], TOLERANCE[dtype])
    assert not got[~sees].any()


@pytest.mark.parametrize(("T", "S"), [(1, 300), (40, 300)])
def test_keys_that_nobody_sees_are_not_read(T, S):
    """Blocks beyond the last position hold NaN: a product with a share of zero would be NaN."""
    q, k, v, _, _ = operands(1, T, S, 4, 2, 16, "float32")
    keys = jnp.where(jnp.arange(S) < 100, jnp.arange(S), EMPTY)[None].astype(jnp.int32)
    queries = (100 - T + jnp.arange(T))[None].astype(jnp.int32)
    run = jax.jit(functools.partial(INTERPRETED, window=None))
    want = run(q, k, v, queries, keys)
    beyond = (jnp.arange(S) >= 128)[None, None, :, None]
    k, v = (jnp.where(beyond, jnp.nan, x) for x in (k, v))
    np.testing.assert_array_equal(run(q, k, v, queries, keys), want)
    keys = keys.at[0, 200].set(50)  # and the test can fail
    assert np.isnan(run(q, k, v, queries, keys)).any()


@pytest.mark.parametrize("window", [None, 20])
def test_gradients_equal_those_of_the_reference(window):
    q, k, v, queries, keys = operands(2, 16, 100, 4, 2, 16, "float32")
    sees = attends(queries, keys, window).any(axis=-1)[..., None, None]

    def gradients(kernel):
        def loss(q, k, v):
            out = kernel(q, k, v, queries, keys, window=window)
            return jnp.where(sees, out**2, 0).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for got, want in zip(gradients(INTERPRETED), gradients(attention), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    ("B", "T", "S", "grid"),
    [
        (1, 1, 4096, (1, 8, 32)),  # few rows: keys are split
        (32, 1, 4096, (1, 256, 1)),
        (1, 512, 32768, (32, 8, 1)),
        (128, 1, 32768, (1, 1024, 1)),  # a cache that 32 bits cannot index
    ],
)
def test_lowers_for_cuda_at_full_size(B, T, S, grid):
    def of(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    cache = of(B, 8, S, 128)
    places = of(B, T, dtype=jnp.int32), of(B, S, dtype=jnp.int32)
    run = jax.jit(functools.partial(flash_attention, window=None))
    lowered = run.trace(of(B, T, 32, 128), cache, cache, *places)
    text = lowered.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 1
    assert "grid_x = {} : i32, grid_y = {} : i32, grid_z = {} : i32".format(*grid) in text
