"""Several adapters on one model, of which each row of a batch uses its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.convert.adapter import Adapter, Factors
from mixtral_jax.errors import BAD_CONFIG, MixtralError, listing
from mixtral_jax.sharding.rules import kind_specs
from mixtral_jax.weights import Adapted, RowAdapted, Weight

_ATTENTION = ".attention."


def attach_each(
    leaves: Mapping[str, Weight],
    adapters: Sequence[Adapter],
    sharding_of: Callable[[str], NamedSharding],
) -> dict[str, Weight]:
    """The leaves, with those that some adapter knows as ``RowAdapted``.

    Row ids count from 1 in the order of ``adapters``; 0 is the base alone.

    Args:
        leaves: loaded weights by path.
        adapters: proved to fit the model.
        sharding_of: as for ``load_weights``; the factors lie along the base.

    Raises:
        MixtralError: exit code 78 for adapters of experts or routers, which all rows would share,
            and for a model that has an adapter already.
    """
    for adapter in adapters:
        others = [leaf for leaf in adapter.parts if _ATTENTION not in leaf]
        if others:
            raise MixtralError(
                f"adapter {adapter.folder}",
                expected="an adapter of attention alone, where rows choose their adapters",
                got=f"factors for {listing(others[:3])}",
                fix="merge it into the weights: convert --adapter",
                code=BAD_CONFIG,
            )
    found: dict[str, list[Factors | None]] = {}
    for number, adapter in enumerate(adapters):
        with adapter.open() as factors:
            for leaf in adapter.parts:
                found.setdefault(leaf, [None] * len(adapters))[number] = factors(leaf)
    adapted = dict(leaves)
    for leaf, each in found.items():
        adapted[leaf] = _row_adapted(leaf, leaves[leaf], each, sharding_of(leaf))
    return adapted


def _row_adapted(
    leaf: str, base: Weight, each: Sequence[Factors | None], sharding: NamedSharding
) -> RowAdapted:
    if isinstance(base, Adapted | RowAdapted):
        fix = "load the model without --adapter"
        raise MixtralError(f"{leaf} has an adapter already", fix=fix, code=BAD_CONFIG)
    num_out, num_in = base.shape
    rank = max(factors.a.shape[1] for factors in each if factors is not None)
    a = np.zeros((len(each) + 1, rank, num_in), np.float32)
    b = np.zeros((len(each) + 1, num_out, rank), np.float32)
    scales = np.zeros((len(each) + 1,), np.float32)
    for number, factors in enumerate(each, start=1):
        if factors is not None:
            own = factors.a.shape[1]
            a[number, :own], b[number, :, :own] = factors.a[0], factors.b[0]
            scales[number] = factors.scale
    whole: Any = RowAdapted(base, a, b, scales)
    specs = kind_specs(whole, sharding.spec)

    def place(array: np.ndarray, spec: PartitionSpec, dtype: Any) -> jax.Array:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = np.ascontiguousarray(array.astype(dtype))
        return jax.make_array_from_callback(
            array.shape, NamedSharding(sharding.mesh, spec), lambda index: cast[index]
        )

    return RowAdapted(
        base,
        place(a, specs.a, base.dtype),
        place(b, specs.b, base.dtype),
        place(scales, specs.scales, np.float32),
    )
