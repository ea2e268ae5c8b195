"""What a call of prefill and a step of decode_step must send between devices, by formula.

``sharding/traffic.py`` has the formulas of a layer; docs/sharding.md has them in words. A test
compares both programs with their compiled form, operation by operation.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from mixtral_jax.sharding.collectives import Collective
from mixtral_jax.sharding.dispatch import PLANS, DispatchOptions
from mixtral_jax.sharding.traffic import Pass, attention_traffic, expert_traffic, heads_axes


class Traffic(NamedTuple):
    """Collectives of a program; all of them are in the compiled one.

    Attributes:
        common: every time.
        payload: rows to their experts and back, besides those, in layers that do not overflow.
        overflow: in place of ``payload`` where every layer overflows its capacity.
        per_call: once per call of decode_step, not per step.
    """

    common: list[Collective]
    payload: list[Collective]
    overflow: list[Collective]
    per_call: list[Collective]


def prefill_traffic(work: Pass) -> Traffic:
    """Of one call of prefill on ``length`` tokens of ``batch`` rows.

    Nothing reads what the experts of the last layer make of a prompt: they do not run.
    """
    L, E = work.config.num_hidden_layers, work.config.num_local_experts
    layers = _layers(work, L - 1)
    if work.method in ("gathered", *PLANS) and not work.is_spread:
        # Expert counts per row, of layers whose routers see a part of each row.
        rows, steps = work.batch // work.mesh.data, work.back
        layers.common.append(Collective("all-gather", rows * L * E * 4, *steps[-1][1:]))
        if len(steps) > 1:
            layers.common.append(Collective("all-reduce", (L - 1) * E * 4, *steps[0][1:]))
    return _between_devices(layers._replace(common=attention_traffic(work) + layers.common))


def decode_traffic(work: Pass) -> Traffic:
    """Of one step of decode_step, in which ``batch`` rows write a token each (``length`` is 1)."""
    assert work.length == 1, work.length
    layers = _layers(work, work.config.num_hidden_layers)
    rows_over = work.mesh.group(*work.rows_axes)
    size = work.batch // rows_over[0] * work.config.vocab_size * 4
    logits = Collective("all-gather", size, *work.mesh.group(*heads_axes(work.strategy)))
    done = Collective("all-reduce", 1, *rows_over)  # is every row done?
    common = [*attention_traffic(work), *layers.common, logits, done]
    return _between_devices(layers._replace(common=common, per_call=[done]))


def _layers(work: Pass, layers: int) -> Traffic:
    """The experts of so many layers."""
    mesh = work.mesh
    one_byte_each = work.rows // mesh.data
    validity = Collective("all-gather", one_byte_each, *mesh.group("expert"))
    layer = expert_traffic(work)
    if work.method == "replicated":
        return Traffic(layer * layers + [validity] * (work.is_spread and layers > 0), [], [], [])
    if work.method == "gathered":
        return Traffic(layer * layers + [validity] * (layers > 0), [], [], [])
    payload = [each for each in layer if each.kind.endswith("all-to-all")]
    common = [each for each in layer if each not in payload]
    everyone = mesh.group("data", "expert")
    if work.options.overflow == "drop":  # the counts of all layers, the last too, in one
        size = 4 * work.config.num_hidden_layers
        counts = Collective("all-reduce", size, *everyone)
        return Traffic([*common * layers, counts], payload * layers, [], [])
    common.append(Collective("all-reduce", 4, *everyone))  # how many overflow
    rare = expert_traffic(dataclasses.replace(work, options=DispatchOptions(method="gathered")))
    # The sum over tensor and the way back to the residual stream are common.
    rare = [each for each in rare if each.kind != "all-reduce"]
    back = 0 if work.is_spread else len(work.back)
    overflow = [*rare[: len(rare) - back], validity] * layers
    return Traffic(common * layers, payload * layers, overflow, [])


def _between_devices(found: Traffic) -> Traffic:
    return Traffic(*([each for each in part if each.group_size > 1] for part in found))
