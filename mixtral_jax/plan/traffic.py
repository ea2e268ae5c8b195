"""What a call of prefill and a step of decode_step must send between devices, by formula.

``sharding/traffic.py`` has the formulas of a layer; docs/sharding.md has them in words. A test
compares both programs with their compiled form, operation by operation.
"""

from __future__ import annotations

from typing import NamedTuple

from mixtral_jax.config import ModelConfig
from mixtral_jax.sharding.collectives import Collective
from mixtral_jax.sharding.dispatch import PLANS, DispatchOptions, choose_for
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.sharding.traffic import (
    attention_traffic,
    back_in,
    expert_traffic,
    heads_ways,
    rows_spread,
)


class Traffic(NamedTuple):
    """Collectives of a program.

    Attributes:
        common: every time.
        overflow: besides those, in a step in which every layer overflows its capacity. Then the
            payload of ``common`` is not sent; both are in the compiled program.
        per_call: once per call of decode_step, not per step.
    """

    common: list[Collective]
    overflow: list[Collective]
    per_call: list[Collective]


def prefill_traffic(
    config: ModelConfig,
    mesh: MeshSpec,
    strategy: Strategy,
    options: DispatchOptions,
    *,
    batch: int,
    chunk: int,
    itemsize: int,
) -> Traffic:
    """Of one call of prefill on ``chunk`` tokens of ``batch`` rows.

    Nothing reads what the experts of the last layer make of a prompt: they do not run.
    """
    common = attention_traffic(config, mesh, strategy, batch=batch, length=chunk, itemsize=itemsize)
    layers = config.num_hidden_layers - 1
    always, overflow = _layers(config, mesh, strategy, options, batch, chunk, itemsize, layers)
    method = choose_for(options, mesh.data, mesh.expert, batch * chunk)
    if method in ("gathered", *PLANS) and not rows_spread(mesh, strategy, batch):
        L, E = config.num_hidden_layers, config.num_local_experts
        # Expert counts per row, of layers whose routers see a part of each row.
        rows, steps = batch // mesh.data, back_in(batch // mesh.data, chunk, mesh.expert)
        always.append(Collective("all-gather", rows * L * E * 4, steps[-1][1]))
        if len(steps) > 1:
            always.append(Collective("all-reduce", layers * E * 4, steps[0][1]))
    return _between_devices(common + always, overflow, [])


def decode_traffic(
    config: ModelConfig,
    mesh: MeshSpec,
    strategy: Strategy,
    options: DispatchOptions,
    *,
    batch: int,
    itemsize: int,
) -> Traffic:
    """Of one step of decode_step, in which ``batch`` rows write a token each."""
    common = attention_traffic(config, mesh, strategy, batch=batch, length=1, itemsize=itemsize)
    layers = config.num_hidden_layers
    always, overflow = _layers(config, mesh, strategy, options, batch, 1, itemsize, layers)
    spread = rows_spread(mesh, strategy, batch)
    shards = mesh.data * (mesh.expert if spread else 1)
    logits = batch // shards * config.vocab_size * 4
    common += always
    common.append(Collective("all-gather", logits, heads_ways(mesh, strategy)))
    done = Collective("all-reduce", 1, shards)  # is every row done?
    return _between_devices([*common, done], overflow, [done])


def _layers(
    config: ModelConfig,
    mesh: MeshSpec,
    strategy: Strategy,
    options: DispatchOptions,
    batch: int,
    length: int,
    itemsize: int,
    layers: int,
) -> tuple[list[Collective], list[Collective]]:
    """The experts of so many layers: what always travels, and what an overflow adds."""
    spread, rows = rows_spread(mesh, strategy, batch), batch * length
    method = choose_for(options, mesh.data, mesh.expert, rows)
    gathered = DispatchOptions(method="gathered")
    validity = Collective("all-gather", rows // mesh.data, mesh.expert)  # one byte each
    shape = {"batch": batch, "length": length, "itemsize": itemsize}
    layer = list(expert_traffic(config, mesh, strategy, options, **shape))
    if method == "replicated":
        return layer * layers + [validity] * (spread and layers > 0), []
    if method == "gathered":
        return layer * layers + [validity] * (layers > 0), []
    if options.overflow == "drop":  # the counts of all layers, the last too, in one
        counts = Collective("all-reduce", 4 * config.num_hidden_layers, mesh.data * mesh.expert)
        return [*layer * layers, counts], []
    layer.append(Collective("all-reduce", 4, mesh.data * mesh.expert))  # how many overflow
    rare = list(expert_traffic(config, mesh, strategy, gathered, **shape))
    # The sum over tensor and the way back to the residual stream are common.
    rare = [each for each in rare if each.kind != "all-reduce"]
    back = 0 if spread else len(back_in(batch // mesh.data, length, mesh.expert))
    return layer * layers, [*rare[: len(rare) - back], validity] * layers


def _between_devices(*lists: list[Collective]) -> Traffic:
    return Traffic(*([each for each in one if each.group_size > 1] for one in lists))
