"""The one table of kernels. A Placement names a row; the caller chooses, never the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from mixtral_jax.kernels.attention import attention, blocked_attention
from mixtral_jax.kernels.contract import contract
from mixtral_jax.kernels.experts import dense_experts, expert_blocks, visit_experts
from mixtral_jax.kernels.rows import lookup, lookup_bits


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One function per operation; every row of the table computes the same numbers."""

    contract: Callable[..., jax.Array]
    lookup: Callable[..., jax.Array]
    attention: Callable[..., jax.Array]
    routed_experts: Callable[..., jax.Array]
    expert_blocks: Callable[..., jax.Array]


KERNELS: dict[str, Kernels] = {
    "reference": Kernels(contract, lookup, attention, dense_experts, expert_blocks),
    "visit": Kernels(contract, lookup_bits, blocked_attention, visit_experts, expert_blocks),
}
DEFAULT_KERNELS = "visit"
