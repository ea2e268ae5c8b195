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


def prefill_traffic(work: Pass) -> Traffic:
    """Of one call of prefill on ``length`` tokens of ``batch`` rows.

    Nothing reads what the experts of the last layer make of a prompt: they do not run.
    """
    L, E = work.config.num_hidden_layers, work.config.num_local_experts
    always, overflow = _layers(work, L - 1)
    if work.method in ("gathered", *PLANS) and not work.is_spread:
        # Expert counts per row, of layers whose routers see a part of each row.
        rows, steps = work.batch // work.mesh.data, work.back
        always.append(Collective("all-gather", rows * L * E * 4, *steps[-1][1:]))
        if len(steps) > 1:
            always.append(Collective("all-reduce", (L - 1) * E * 4, *steps[0][1:]))
    return _between_devices(attention_traffic(work) + always, overflow, [])


def decode_traffic(work: Pass) -> Traffic:
    """Of one step of decode_step, in which ``batch`` rows write a token each (``length`` is 1)."""
    assert work.length == 1, work.length
    always, overflow = _layers(work, work.config.num_hidden_layers)
    rows_over = work.mesh.group(*work.rows_axes)
    size = work.batch // rows_over[0] * work.config.vocab_size * 4
    logits = Collective("all-gather", size, *work.mesh.group(*heads_axes(work.strategy)))
    done = Collective("all-reduce", 1, *rows_over)  # is every row done?
    common = [*attention_traffic(work), *always, logits, done]
    return _between_devices(common, overflow, [done])


def _layers(work: Pass, layers: int) -> tuple[list[Collective], list[Collective]]:
    """The experts of so many layers: what always travels, and what an overflow adds."""
    mesh = work.mesh
    one_byte_each = work.rows // mesh.data
    validity = Collective("all-gather", one_byte_each, *mesh.group("expert"))
    everyone = mesh.group("data", "expert")
    layer = expert_traffic(work)
    if work.method == "replicated":
        return layer * layers + [validity] * (work.is_spread and layers > 0), []
    if work.method == "gathered":
        return layer * layers + [validity] * (layers > 0), []
    if work.options.overflow == "drop":  # the counts of all layers, the last too, in one
        size = 4 * work.config.num_hidden_layers
        counts = Collective("all-reduce", size, *everyone)
        return [*layer * layers, counts], []
    layer.append(Collective("all-reduce", 4, *everyone))  # how many overflow
    rare = expert_traffic(dataclasses.replace(work, options=DispatchOptions(method="gathered")))
    # The sum over tensor and the way back to the residual stream are common.
    rare = [each for each in rare if each.kind != "all-reduce"]
    back = 0 if work.is_spread else len(work.back)
    return layer * layers, [*rare[: len(rare) - back], validity] * layers


def _between_devices(*lists: list[Collective]) -> Traffic:
    return Traffic(*([each for each in one if each.group_size > 1] for one in lists))
