"""A model in two parts: what stays on the device, and experts one by one in host memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert.load import HOST
from mixtral_jax.convert.names import EXPERT_LEAF
from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.model.transformer import Block, Mixtral, assemble
from mixtral_jax.weights import ExpertSlots

_HIDDEN = ("gate", "up", "down")


def num_bytes(tree: Any) -> int:
    """Of all arrays of a tree, or of what stands for them."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def host_experts(
    sharding_of: Callable[[str], NamedSharding],
) -> Callable[[str], NamedSharding]:
    """What ``load_weights`` asks for: experts in host memory that the device can copy from."""

    def found(path: str) -> NamedSharding:
        whole = sharding_of(path)
        return whole.with_memory_kind(HOST) if EXPERT_LEAF.fullmatch(path) else whole

    return found


class Parts(NamedTuple):
    """A model without its experts, taken apart, and its experts.

    Attributes:
        ends: embedding, last norm and head; it has no layers.
        blocks: the layers without their experts.
        experts: ``experts[layer][e]`` with leaves ``[1, O, I]`` of any kind, in pinned memory of
            the host, or shapes in place of arrays.
        config: of the whole model.
    """

    ends: Mixtral
    blocks: list[Block]
    experts: list[list[ExpertWeights]]
    config: ModelConfig

    @property
    def device_bytes(self) -> int:
        """Of what stays on the device."""
        return num_bytes((self.ends, self.blocks))

    @property
    def expert_bytes(self) -> int:
        """Of the largest expert."""
        return max(num_bytes(expert) for layer in self.experts for expert in layer)

    @property
    def num_experts(self) -> int:
        """Of all layers together."""
        return sum(len(layer) for layer in self.experts)


def take_apart(config: ModelConfig, leaves: Mapping[str, Any]) -> Parts:
    """Splits loaded leaves, those of experts as ``ExpertSlots`` of one expert each."""
    model = without_experts(config, leaves)
    experts = []
    for i in range(config.num_hidden_layers):
        slots = [leaves[f"layers.{i}.moe.experts.{name}"] for name in _HIDDEN]
        assert all(isinstance(w, ExpertSlots) for w in slots)
        experts.append(
            [ExpertWeights(*three) for three in zip(*(w.slots for w in slots), strict=True)]
        )
    blocks = list(model.layers)
    ends = nnx.merge(*nnx.split(model))  # a module of its own, of the same arrays
    ends.layers = nnx.List([])
    return Parts(ends, blocks, experts, config)


def without_experts(config: ModelConfig, leaves: Mapping[str, Any]) -> Mixtral:
    """The model with None for every expert leaf: whoever would use one fails."""
    model = assemble(config, leaves)
    for block in model.layers:
        for name in _HIDDEN:
            setattr(block.moe.experts, name, nnx.Param(None))
    return model


def on_device(parts: Parts, device: Any) -> Parts:
    """What stays on the device, with the plain sharding of that device."""
    sharding = SingleDeviceSharding(device)
    return parts._replace(
        ends=jax.device_put(parts.ends, sharding),
        blocks=[jax.device_put(block, sharding) for block in parts.blocks],
    )


@dataclasses.dataclass(frozen=True)
class Least:
    """The device bytes that a workload cannot do without, by kind."""

    weights: int
    state: int
    working: int
    expert: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(dataclasses.astuple(self))
