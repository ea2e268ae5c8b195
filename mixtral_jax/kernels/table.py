"""The one table of kernels. A Placement names a row; the caller chooses, never the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax

from mixtral_jax.kernels.accelerator import (
    gpu_attention,
    gpu_blocks,
    gpu_routed_experts,
    stacked_blocks,
    tpu_routed_experts,
)
from mixtral_jax.kernels.attention import attention, blocked_attention
from mixtral_jax.kernels.contract import contract
from mixtral_jax.kernels.cpu_product import cpu_product
from mixtral_jax.kernels.experts import dense_experts, expert_blocks
from mixtral_jax.kernels.row_experts import cpu_routed_experts
from mixtral_jax.kernels.rows import lookup, lookup_in_place
from mixtral_jax.weights import Layout


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One function per operation; every row of the table computes the same numbers.

    ``layout`` is how experts are to be laid out at load; other layouts work, with copies.
    """

    contract: Callable[..., jax.Array]
    lookup: Callable[..., jax.Array]
    attention: Callable[..., jax.Array]
    routed_experts: Callable[..., jax.Array]
    expert_blocks: Callable[..., jax.Array]
    layout: Layout


KERNELS: dict[str, Kernels] = {
    "reference": Kernels(contract, lookup, attention, dense_experts, expert_blocks, "slots"),
    "visit": Kernels(
        functools.partial(contract, product=cpu_product),
        lookup_in_place,
        blocked_attention,
        cpu_routed_experts,
        functools.partial(expert_blocks, product=cpu_product),
        "slots",
    ),
    "gpu": Kernels(contract, lookup, gpu_attention, gpu_routed_experts, gpu_blocks, "stacked"),
    "tpu": Kernels(
        contract, lookup, blocked_attention, tpu_routed_experts, stacked_blocks, "stacked"
    ),
}
DEFAULT_KERNELS = "visit"


def kernels_for(platform: str) -> str:
    """The row for a JAX platform: gpu (also spelled cuda or rocm), tpu, else the CPU's."""
    rows = {"gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
    return rows.get(platform, DEFAULT_KERNELS)
