"""What a forward pass must send between devices, by formula; docs/sharding.md has it in words.

A test compares it with the compiled programs, operation by operation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

from mixtral_jax.config import ModelConfig
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.sharding.collectives import Collective
from mixtral_jax.sharding.dispatch import PLANS, DispatchOptions, choose_for
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.per_device import device_capacity, shared_buffer
from mixtral_jax.sharding.per_expert import capacity
from mixtral_jax.sharding.report import shard_shape
from mixtral_jax.sharding.rules import MIN_ROWS_PER_DEVICE, partition_spec
from mixtral_jax.sharding.strategy import Strategy

_F32 = _I32 = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass of rows through the model on a mesh.

    Attributes:
        config: sizes.
        mesh: already fitted to the model.
        strategy: how weights and attention are placed.
        options: how rows travel.
        batch: rows over all devices; a multiple of the data axis.
        length: tokens per row.
        itemsize: bytes of an activation and of a weight.
    """

    config: ModelConfig
    mesh: MeshSpec
    strategy: Strategy
    options: DispatchOptions
    batch: int
    length: int
    itemsize: int

    @property
    def rows(self) -> int:
        """Tokens over all devices."""
        return self.batch * self.length

    @property
    def method(self) -> str:
        """The dispatch that runs."""
        return choose_for(self.options, self.mesh.data, self.mesh.expert, self.rows)

    @property
    def is_spread(self) -> bool:
        """Whether the rows lie over data x expert."""
        return rows_spread(self.mesh, self.strategy, self.batch)

    @property
    def rows_axes(self) -> tuple[str, ...]:
        """Mesh axes that the rows lie over."""
        return ("data", "expert") if self.is_spread else ("data",)

    @property
    def back(self) -> list[BackStep]:
        """``back_in`` of a batch that is not spread."""
        return back_in(self.batch // self.mesh.data, self.length, self.mesh)


class BackStep(NamedTuple):
    """A gather of 1 / ``share`` of the rows of a data shard, over ``ways`` devices."""

    share: int
    ways: int
    span: int


def forward_traffic(work: Pass) -> list[Collective]:
    """Collectives of one pass, up to the last norm.

    Counted as the common step runs them: no overflow, so no gathered path under "exact".
    """
    found = list(_weights(work)) if work.strategy.fsdp else []
    found += attention_traffic(work)
    found += work.config.num_hidden_layers * expert_traffic(work)
    return [each for each in found if each.group_size > 1]


def rows_spread(mesh: MeshSpec, strategy: Strategy, batch: int) -> bool:
    """Whether the rows of a batch lie over data x expert: the rule of ``rules.batch_axes``."""
    shards = mesh.data * mesh.expert
    enough = batch % shards == 0 and batch // shards >= MIN_ROWS_PER_DEVICE
    return strategy.attention == "data" and enough


def heads_axes(strategy: Strategy) -> tuple[str, ...]:
    """Mesh axes that heads and vocabulary are split over."""
    return ("expert", "tensor") if strategy.attention == "tensor" else ("tensor",)


def attention_traffic(work: Pass) -> list[Collective]:
    """The embedding, and the attention of every layer."""
    D, over = work.config.hidden_size, work.mesh.group(*heads_axes(work.strategy))
    shards, _ = work.mesh.group(*work.rows_axes)
    local = work.rows // shards  # rows of the residual stream on one device
    o_proj = Collective("all-reduce", local * D * _F32, *over)  # heads are summed over
    embedding = Collective("all-reduce", local * D * work.itemsize, *over)  # by vocabulary
    return [embedding, *[o_proj] * work.config.num_hidden_layers]


def expert_traffic(work: Pass) -> list[Collective]:
    """One layer's experts as the common step runs them."""
    mesh, method, D = work.mesh, work.method, work.config.hidden_size
    S, A = mesh.expert, work.config.num_experts_per_tok
    over = mesh.group("expert")
    n = -(-work.rows // (mesh.data * S))  # rows that travel from one device
    all_rows = n * S
    found: list[Collective] = []
    if method == "replicated":
        if work.is_spread:  # every device of the expert axis sees the rows of all, and routes them
            found.append(Collective("all-gather", all_rows * D * work.itemsize, *over))
        share = work.rows // mesh.data
        return [*found, Collective("all-reduce", share * D * _F32, *mesh.group("expert", "tensor"))]
    if method == "gathered":
        found.append(Collective("all-gather", all_rows * D * work.itemsize, *over))
        found += [Collective("all-gather", all_rows * A * _I32, *over)] * 2
        found.append(Collective("reduce-scatter", all_rows * D * _F32, *over))
    else:
        assert method in PLANS, method
        found += work.options.chunks * _exchanges(work, -(-n // work.options.chunks))
    parts_of_f = Collective("all-reduce", n * D * _F32, *mesh.group("tensor"))
    found.append(parts_of_f)
    if not work.is_spread:
        # Back to the residual stream: length by length where the batch has fewer rows than devices.
        whole = all_rows * D * work.itemsize
        found += [Collective("all-gather", whole // step.share, *step[1:]) for step in work.back]
    return found


def back_in(batch: int, length: int, mesh: MeshSpec) -> list[BackStep]:
    """How rows split over the expert axis are gathered to ``[batch, length]`` on each device."""
    shards, step = mesh.expert, mesh.tensor
    if length == 1 or batch == 1 or batch >= shards:
        return [BackStep(1, *mesh.group("expert"))]
    inner = shards // batch  # neighbours, who share a row
    return [
        BackStep(batch, inner, 1 + (inner - 1) * step),
        BackStep(1, batch, 1 + (batch - 1) * inner * step),
    ]


def _exchanges(work: Pass, n: int) -> list[Collective]:
    """What ``n`` rows of each device take there and back."""
    D, E = work.config.hidden_size, work.config.num_local_experts
    A, S, factor = work.config.num_experts_per_tok, work.mesh.expert, work.options.capacity_factor
    row, over = D * work.itemsize, work.mesh.group("expert")
    if work.method == "all_to_all":
        return [Collective("all-to-all", E * capacity(n, A, E, factor) * row, *over)] * 2
    if work.method == "all_to_all_once":
        slots = S * device_capacity(n, A, num_experts=E, shards=S, factor=factor)
        ids_and_weights = Collective("all-to-all", slots * 2 * A * _F32, *over)
        return [*[Collective("all-to-all", slots * row, *over)] * 2, ids_and_weights]
    slots = shared_buffer(n, A, num_experts=E, shards=S, factor=factor)
    return [
        Collective("ragged-all-to-all", slots * row, *over),
        Collective("ragged-all-to-all", slots * 2 * A * _F32, *over),
        Collective("ragged-all-to-all", n * min(A, S) * row, *over),
        Collective("all-gather", S * S * _I32, *over),  # who sends how much to whom
    ]


def _weights(work: Pass) -> Iterator[Collective]:
    """fsdp: every weight with an embed dim, gathered over data where it is used."""
    rules = work.strategy.weight_rules()
    slots = work.config.num_local_experts // work.mesh.expert
    for path, spec in leaf_specs(work.config).items():
        if "embed" in spec.axes and path != "lm_head":  # which this pass does not use
            part = shard_shape(spec.shape, partition_spec(spec.axes, rules), work.mesh)
            count = slots if "expert" in spec.axes else 1
            size = math.prod(part) * work.itemsize // count
            yield from [Collective("all-gather", size, *work.mesh.group("data"))] * count
