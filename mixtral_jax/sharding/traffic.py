"""What a forward pass must send between devices, by formula; docs/sharding.md has it in words.

A test compares it with the compiled programs, operation by operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.sharding.collectives import Collective
from mixtral_jax.sharding.dispatch import PLANS, DispatchOptions, choose_for
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.per_device import device_capacity, visit_share
from mixtral_jax.sharding.per_expert import capacity
from mixtral_jax.sharding.report import shard_shape
from mixtral_jax.sharding.rules import MIN_ROWS_PER_DEVICE, partition_spec
from mixtral_jax.sharding.strategy import Strategy

_F32 = _I32 = 4


def forward_traffic(
    config: ModelConfig,
    mesh: MeshSpec,
    strategy: Strategy,
    options: DispatchOptions,
    *,
    batch: int,
    length: int,
    itemsize: int,
) -> list[Collective]:
    """Collectives of one pass over ``batch`` rows of ``length`` tokens, up to the last norm.

    Counted as the common step runs them: no overflow, so no gathered path under "exact".

    Args:
        config: sizes.
        mesh: already fitted to the model.
        strategy: how weights and attention are placed.
        options: how rows travel.
        batch: rows over all devices; a multiple of the data axis.
        length: tokens per row.
        itemsize: bytes of an activation and of a weight.
    """
    found = [] if not strategy.fsdp else list(_weights(config, mesh, strategy, itemsize))
    L = config.num_hidden_layers
    found += attention_traffic(
        config, mesh, strategy, batch=batch, length=length, itemsize=itemsize
    )
    found += L * list(
        expert_traffic(
            config, mesh, strategy, options, batch=batch, length=length, itemsize=itemsize
        )
    )
    return [each for each in found if each.group_size > 1]


def rows_spread(mesh: MeshSpec, strategy: Strategy, batch: int) -> bool:
    """Whether the rows of a batch lie over data x expert: the rule of ``rules.batch_axes``."""
    shards = mesh.data * mesh.expert
    enough = batch % shards == 0 and batch // shards >= MIN_ROWS_PER_DEVICE
    return strategy.attention == "data" and enough


def heads_ways(mesh: MeshSpec, strategy: Strategy) -> int:
    """Devices that heads and vocabulary are split over."""
    return mesh.tensor * (mesh.expert if strategy.attention == "tensor" else 1)


def attention_traffic(
    config: ModelConfig,
    mesh: MeshSpec,
    strategy: Strategy,
    *,
    batch: int,
    length: int,
    itemsize: int,
) -> list[Collective]:
    """The embedding, and the attention of every layer; arguments as of ``forward_traffic``."""
    D, ways = config.hidden_size, heads_ways(mesh, strategy)
    shards = mesh.data * (mesh.expert if rows_spread(mesh, strategy, batch) else 1)
    local = batch * length // shards  # rows of the residual stream on one device
    o_proj = Collective("all-reduce", local * D * _F32, ways)  # heads are summed over
    embedding = Collective("all-reduce", local * D * itemsize, ways)  # by vocabulary
    return [embedding, *[o_proj] * config.num_hidden_layers]


def expert_traffic(
    config: ModelConfig,
    mesh: MeshSpec,
    strategy: Strategy,
    options: DispatchOptions,
    *,
    batch: int,
    length: int,
    itemsize: int,
) -> Iterator[Collective]:
    """One layer's experts as the common step runs them; arguments as of ``forward_traffic``."""
    rows, spread = batch * length, rows_spread(mesh, strategy, batch)
    D, E, A, S = (
        config.hidden_size,
        config.num_local_experts,
        config.num_experts_per_tok,
        mesh.expert,
    )
    method = choose_for(options, mesh.data, S, rows)
    n = -(-rows // (mesh.data * S))  # rows that travel from one device
    all_rows = n * S
    if method == "replicated":
        if spread:  # every device of the expert axis sees the rows of all, and routes them
            yield Collective("all-gather", all_rows * D * itemsize, S)
        yield Collective("all-reduce", rows // mesh.data * D * _F32, S * mesh.tensor)
        return
    if method == "gathered":
        yield Collective("all-gather", all_rows * D * itemsize, S)
        yield from [Collective("all-gather", all_rows * A * _I32, S)] * 2
        yield Collective("reduce-scatter", all_rows * D * _F32, S)
    else:
        assert method in PLANS, method
        factor, part = options.capacity_factor, -(-n // options.chunks)
        for _ in range(options.chunks):
            yield from _exchanges(method, part, D, E, A, S, factor, itemsize)
    yield Collective("all-reduce", n * D * _F32, mesh.tensor)  # parts of F are summed
    if not spread:
        # Back to the residual stream: length by length where the batch has fewer rows than devices.
        for share, ways in back_in(batch // mesh.data, length, S):
            yield Collective("all-gather", all_rows * D * itemsize // share, ways)


def back_in(batch: int, length: int, shards: int) -> list[tuple[int, int]]:
    """How rows split over ``shards`` devices are gathered to ``[batch, length]`` on each of them.

    Returns:
        Steps as (share, ways): a result of 1 / share of the whole, over so many devices.
    """
    if length == 1 or batch == 1 or batch >= shards:
        return [(1, shards)]
    return [(batch, shards // batch), (1, batch)]


def _exchanges(
    method: str, n: int, D: int, E: int, A: int, S: int, factor: float, itemsize: int
) -> Iterator[Collective]:
    if method == "all_to_all":
        size = E * capacity(n, A, E, factor) * D * itemsize
        yield from [Collective("all-to-all", size, S)] * 2
        return
    if method == "all_to_all_once":
        slots = S * device_capacity(n, A, num_experts=E, shards=S, factor=factor)
        yield from [Collective("all-to-all", slots * D * itemsize, S)] * 2
        yield Collective("all-to-all", slots * 2 * A * _F32, S)  # ids and weights
        return
    slots = min(n * S, math.ceil(round(factor * n * S * visit_share(E, S, A), 9)))
    yield Collective("ragged-all-to-all", slots * D * itemsize, S)
    yield Collective("ragged-all-to-all", slots * 2 * A * _F32, S)
    yield Collective("ragged-all-to-all", n * min(A, S) * D * itemsize, S)
    yield Collective("all-gather", S * S * _I32, S)  # who sends how much to whom


def _weights(
    config: ModelConfig, mesh: MeshSpec, strategy: Strategy, itemsize: int
) -> Iterator[Collective]:
    """fsdp: every weight with an embed dim, gathered over data where it is used."""
    rules = strategy.weight_rules()
    slots = config.num_local_experts // mesh.expert
    for path, spec in leaf_specs(config).items():
        if "embed" in spec.axes and path != "lm_head":  # which this pass does not use
            part = shard_shape(spec.shape, partition_spec(spec.axes, rules), mesh)
            count = slots if "expert" in spec.axes else 1
            size = math.prod(part) * itemsize // count
            yield from [Collective("all-gather", size, mesh.data)] * count
