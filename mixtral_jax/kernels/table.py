"""The one table of kernels. A Placement names a row; the caller chooses, never the model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

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
from mixtral_jax.kernels.scaled_kv import KVDtype, storage_dtype
from mixtral_jax.weights import Layout


@dataclasses.dataclass(frozen=True)
class Kernels:
    """One function per operation; every row of the table computes the same numbers.

    ``layout`` is how experts are to be laid out at load; other layouts work, with copies. With
    ``wide_cache`` keys and values of 16 bits are held in f32: the CPU's compiler writes to an array
    of 16-bit floats by widening and narrowing all of it.
    """

    contract: Callable[..., jax.Array]
    lookup: Callable[..., jax.Array]
    attention: Callable[..., jax.Array]
    routed_experts: Callable[..., jax.Array]
    expert_blocks: Callable[..., jax.Array]
    layout: Layout
    wide_cache: bool = False


KERNELS: dict[str, Kernels] = {
    "reference": Kernels(contract, lookup, attention, dense_experts, expert_blocks, "slots"),
    # Few and plain operations: compiles in seconds at any size (plan/programs.py).
    "dense": Kernels(contract, lookup, blocked_attention, dense_experts, expert_blocks, "slots"),
    "visit": Kernels(
        functools.partial(contract, product=cpu_product),
        lookup_in_place,
        blocked_attention,
        cpu_routed_experts,
        functools.partial(expert_blocks, product=cpu_product),
        "slots",
        wide_cache=True,
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


def cache_dtype(kernels: str, kv_dtype: KVDtype | None, activations: Any) -> Any:
    """The dtype that keys and values have in the cache where that row of the table reads them.

    Args:
        kernels: a row of the table.
        kv_dtype: of codes, or None for plain arrays.
        activations: their dtype, whose numbers the cache holds without codes.
    """
    dtype = storage_dtype(kv_dtype, activations)
    is_wider = kv_dtype is None and KERNELS[kernels].wide_cache and dtype.itemsize < 4
    return jnp.dtype(jnp.float32) if is_wider else dtype
