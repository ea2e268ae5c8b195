"""Which operand first? Products of a few rows with one weight after another, in a chain.

The orders that `kernels/cpu_product.py` chooses between; the weights are more than any cache holds,
and each product waits for the one before, as in a step of decode.

    python benchmarks/products.py --rows 2 4 8 32 128
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from _common import interleaved, report, run_script, spread

from mixtral_jax.kernels.contract import rows_first
from mixtral_jax.kernels.cpu_product import weight_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times both orders of operands."""

    rows: tuple[int, ...] = (2, 4, 8, 32, 128)
    """Rows of a product."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Of rows and weights."""
    shape: tuple[int, ...] = (3584, 1024)
    """Of a weight: outputs, inputs."""
    weights: int = 32
    """Weights in a chain."""
    rounds: int = 7
    """Repeats of each, in turn; the median counts."""
    quick: bool = False
    """Small weights and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


ORDERS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "rows first": rows_first,
    "weight first": lambda x, w: weight_first(w, x, jnp.float32),
}


def chain(product: Callable, x: jax.Array, weights: list[jax.Array]) -> Callable[[], jax.Array]:
    """A call of all products, each after the one before."""

    @jax.jit
    def run(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for w in weights:
            x = x + (product(x, w).sum() * 1e-9).astype(x.dtype)
        return x

    return lambda: jax.block_until_ready(run(x, weights))


def main(options: Options) -> int:
    """Runs and prints."""
    if options.quick:
        options = dataclasses.replace(options, rows=(2,), shape=(64, 32), weights=2, rounds=1)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        keys = jax.random.split(jax.random.key(0), options.weights)
        weights = [jax.random.normal(key, options.shape).astype(dtype) for key in keys]
        for count in options.rows:
            x = jnp.ones((count, options.shape[1]), dtype)
            calls = [chain(product, x, weights) for product in ORDERS.values()]
            for call in calls:
                call()
            times = interleaved(calls, options.rounds, f"{dtype}, {count} rows")
            for name, seconds in zip(ORDERS, times, strict=True):
                each = statistics.median(seconds) / options.weights
                rows.append(
                    {
                        "dtype": dtype,
                        "rows": count,
                        "order": name,
                        "us": round(1e6 * each),
                        "GB/s": round(weights[0].nbytes / each / 1e9, 1),
                        "spread": spread(seconds),
                    }
                )
    asked = dataclasses.asdict(options)
    asked["counts"] = asked.pop("rows")
    report(rows, is_json=options.json, **asked)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
