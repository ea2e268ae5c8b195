"""The machine's limits, measured in the run whose numbers they are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def _best(call: Callable[[], Any], rounds: int = 7) -> float:
    jax.block_until_ready(call())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_bandwidth(num_bytes: int) -> float:
    """Bytes per second at which the device reads memory: the best of three ways, seven runs each.

    A sum of all elements, and products of a matrix with one row and with eight.
    """
    columns = 4096
    x = jnp.ones((num_bytes // 4 // columns, columns), jnp.float32)
    rows = jnp.ones((8, columns), jnp.float32)
    product = jax.jit(lambda x, rows: jnp.einsum("OI,NI->NO", x, rows))
    ways = [
        _best(lambda: jnp.sum(x, axis=0)),
        _best(lambda: product(x, rows[:1])),
        _best(lambda: product(x, rows)),
    ]
    return x.nbytes / min(ways)


def matmul_flops(size: int, dtype: str) -> float:
    """FLOP/s of one product of square matrices, f32 accumulation: the better layout of two."""
    x = jnp.ones((size, size), jnp.dtype(dtype))

    def seconds(einsum: str) -> float:
        product = jax.jit(lambda x, y: jnp.einsum(einsum, x, y, preferred_element_type="float32"))
        return _best(lambda: product(x, x))

    return 2 * size**3 / min(map(seconds, ("NI,OI->NO", "OI,IN->ON")))
