"""Which operand first? Some rows through one expert after another.

The orders that `kernels/cpu_product.py` chooses between. Whole experts, because what reads a
product decides how its result must lie; they are more than any cache holds, and each waits for the
one before, as in a step of decode.

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

from mixtral_jax.kernels.contract import Product, rows_first
from mixtral_jax.kernels.cpu_product import weight_first
from mixtral_jax.kernels.experts import feed_forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times both orders of operands."""

    rows: tuple[int, ...] = (2, 4, 8, 32, 128)
    """Rows of an expert."""
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Of rows and weights."""
    shape: tuple[int, ...] = (3584, 1024)
    """Of an expert: hidden and model width."""
    experts: int = 12
    """In a chain."""
    rounds: int = 7
    """Repeats of each, in turn; the median counts."""
    quick: bool = False
    """Small weights and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def weight_first_f32(x: jax.Array, w: Any) -> jax.Array:
    """``weight_first`` as a Product."""
    return weight_first(w, x, jnp.float32)


ORDERS: dict[str, Product] = {
    "rows first": rows_first,
    "weight first": weight_first_f32,
}


def chain(product: Product, x: jax.Array, experts: list[list[jax.Array]]) -> Callable:
    """A call of all experts, each after the one before."""

    @jax.jit
    def run(x: jax.Array, experts: list[list[jax.Array]]) -> jax.Array:
        for gate, up, down in experts:
            x = x + (feed_forward(x, gate, up, down, product=product) * 1e-3).astype(x.dtype)
        return x

    return lambda: jax.block_until_ready(run(x, experts))


def main(options: Options) -> int:
    """Runs and prints."""
    if options.quick:
        options = dataclasses.replace(options, rows=(2,), shape=(64, 32), experts=2, rounds=1)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        F, D = options.shape
        keys = jax.random.split(jax.random.key(0), (options.experts, 3))
        experts = [
            [
                (jax.random.normal(key, shape) / shape[1] ** 0.5).astype(dtype)
                for key, shape in zip(each, ((F, D), (F, D), (D, F)), strict=True)
            ]
            for each in keys
        ]
        size = sum(w.nbytes for w in experts[0])
        for count in options.rows:
            x = jax.random.normal(jax.random.key(1), (count, D)).astype(dtype)
            calls = [chain(product, x, experts) for product in ORDERS.values()]
            for call in calls:
                call()
            times = interleaved(calls, options.rounds, f"{dtype}, {count} rows")
            for name, seconds in zip(ORDERS, times, strict=True):
                each = statistics.median(seconds) / options.experts
                rows.append(
                    {
                        "dtype": dtype,
                        "rows": count,
                        "order": name,
                        "us": round(1e6 * each),
                        "GB/s": round(size / each / 1e9, 1),
                        "spread": spread(seconds),
                    }
                )
    asked = dataclasses.asdict(options)
    asked["counts"] = asked.pop("rows")
    report(rows, is_json=options.json, **asked)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
