"""Which weights train: low-rank factors on frozen ones (LoRA, arXiv 2106.09685), or all of them.

A trained leaf is a plain array, or ``Pair`` of factors beside the frozen leaf of the same path. The
factors of experts are stacked as the experts are, ``[E, R, I]`` and ``[E, O, R]``, and lie with
them on the mesh.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import BAD_CONFIG, USAGE, MixtralError
from mixtral_jax.model.transformer import LeafSpec, Mixtral, assemble, leaf_specs
from mixtral_jax.weights import Adapted, ExpertSlots, Matrix, Weight

# What a target's name stands for: endings of leaf paths. Names as published checkpoints and peft
# have them, and plain ones.
_EXPERTS = ("moe.experts.gate", "moe.experts.up", "moe.experts.down")
_ATTENTION = tuple(f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
_ROUTER = ("moe.router.weight",)
TARGETS: dict[str, tuple[str, ...]] = {
    **{end.rpartition(".")[2]: (end,) for end in _ATTENTION},
    "w1": _EXPERTS[:1],
    "w3": _EXPERTS[1:2],
    "w2": _EXPERTS[2:],
    "experts": _EXPERTS,
    "gate": _ROUTER,
    "router": _ROUTER,
    "all-linear": (*_ATTENTION, *_EXPERTS, *_ROUTER),
}


class Pair(NamedTuple):
    """Factors A ``[..., R, I]`` and B ``[..., O, R]`` of one leaf, f32."""

    a: Any
    b: Any


def is_pair(leaf: object) -> bool:
    """Whether a trained leaf is a Pair (a leaf itself where trees are walked by path)."""
    return isinstance(leaf, Pair)


def check_targets(targets: Sequence[str], dropout: float) -> None:
    """Refuses names that no model has, and dropout for experts: as in peft, which has none there
    (rows of a batch are in no fixed order).

    Raises:
        MixtralError: exit code 64 for a name, 78 for dropout.
    """
    unknown = [name for name in targets if name not in TARGETS]
    if unknown or not targets:
        raise MixtralError(
            "--lora-target-modules",
            expected=", ".join(TARGETS),
            got=", ".join(map(repr, unknown)) or "none",
            code=USAGE,
        )
    if dropout and any(end in _EXPERTS for name in targets for end in TARGETS[name]):
        raise MixtralError(
            "--lora-dropout",
            expected="0 where experts are adapted",
            got=dropout,
            fix="--lora-dropout 0",
            code=BAD_CONFIG,
        )


def target_paths(config: ModelConfig, targets: Sequence[str]) -> tuple[str, ...]:
    """The leaves that checked targets name."""
    ends = {f".{end}" for name in targets for end in TARGETS[name]}
    return tuple(path for path in leaf_specs(config) if any(path.endswith(end) for end in ends))


def scale_of(rank: int, alpha: float, *, is_stabilized: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) of rank-stabilised adapters (arXiv 2312.03732)."""
    return alpha / (math.sqrt(rank) if is_stabilized else rank)


def pair_shapes(spec: LeafSpec, rank: int) -> Pair:
    """Shapes of the factors of a leaf."""
    *stack, out, summed = spec.shape
    return Pair((*stack, rank, summed), (*stack, out, rank))


def pair_shardings(spec: PartitionSpec, mesh: Any) -> Pair:
    """Where the factors of a leaf lie: along its inputs, its outputs and its experts."""
    *stack, out, summed = spec
    return Pair(
        NamedSharding(mesh, PartitionSpec(*stack, None, summed)),
        NamedSharding(mesh, PartitionSpec(*stack, out, None)),
    )


def first_pair(spec: LeafSpec, path: str, rank: int, seed: int) -> Pair:
    """Random A as ``torch.nn.Linear`` draws its weights, which peft does too; B of zeros.

    The draw depends on the seed and the path alone, so that it is the same on every mesh.
    """
    shapes = pair_shapes(spec, rank)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()) & 0x7FFFFFFF)
    bound = 1 / math.sqrt(spec.shape[-1])
    a = jax.random.uniform(key, shapes.a, jnp.float32, -bound, bound)
    return Pair(a, jnp.zeros(shapes.b, jnp.float32))


def with_trained(
    config: ModelConfig,
    frozen: Mapping[str, Weight],
    trained: Mapping[str, Any],
    *,
    scale: float,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    dtype: Any = None,
) -> Mixtral:
    """The model that frozen and trained leaves make.

    Args:
        config: sizes.
        frozen: weights of any kind, by path; those that train whole need not be there.
        trained: arrays and Pairs, by path.
        scale: of every Pair.
        dropout: of the input of A, in training.
        key: random, of this step; None drops nothing.
        dtype: whole trained leaves are used in this one; None leaves them as they are.
    """
    leaves = dict(frozen)
    for path, leaf in trained.items():
        if not is_pair(leaf):
            leaves[path] = leaf if dtype is None else leaf.astype(dtype)
            continue
        own = None
        if key is not None and dropout:
            own = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        leaves[path] = _adapted(frozen[path], leaf, scale, own, dropout)
    return assemble(config, leaves)


def _adapted(base: Weight, pair: Pair, scale: float, key: Any, dropout: float) -> Weight:
    if not isinstance(base, ExpertSlots):
        return Adapted(
            cast(Matrix, base), pair.a, pair.b, scale, key, dropout if key is not None else 0.0
        )
    num_slots = len(base.slots)

    def slots(factor: jax.Array) -> jax.Array:
        """``[shards, slots, ...]``: expert e is row e // n of slot e % n, on its own device."""
        return factor.reshape(-1, num_slots, *factor.shape[1:])

    a, b = slots(pair.a), slots(pair.b)
    return ExpertSlots(
        tuple(Adapted(slot, a[:, i], b[:, i], scale) for i, slot in enumerate(base.slots))
    )
