"""What the gpu and tpu rows of the table choose, by kind of weight, dtype and number of rows.

On a GPU quantized experts have kernels of their own, for any number of rows. Other weights that are
no arrays (adapted; in 3 bits) or of another dtype than the rows take the paths of the CPU, as does
the gpu row on a CPU: Pallas would need its interpreter there. Pallas is imported where it is first
used, never with the table.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.attention import blocked_attention
from mixtral_jax.kernels.experts import ExpertWeights, expert_blocks, visit_experts
from mixtral_jax.kernels.grouped_experts import batched_blocks, grouped_experts
from mixtral_jax.kernels.widen import is_widened

# On a GPU, up to so many rows take the Pallas kernels, more the grouped products. To be measured:
# the kernels read an expert's weights once per 64 of its rows.
FEW_ROWS = 512


def is_stacked(x: jax.Array, experts: ExpertWeights) -> bool:
    """Whether all experts are arrays in the dtype of the rows."""
    return all(isinstance(w, jax.Array) and w.dtype == x.dtype for w in experts)


def gpu_routed_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    expected: float,
) -> Float[Array, "N D"]:
    """``visit_experts`` by the Pallas kernels or, for many rows of arrays, by grouped products."""
    operands = (out, x, expert_ids, expert_weights, valid, experts)
    if all(map(is_widened, experts)):
        from mixtral_jax.kernels.quantized_experts import quantized_experts

        return jax.lax.platform_dependent(
            *operands,
            cpu=functools.partial(visit_experts, expected=expected),
            default=functools.partial(quantized_experts, expected=expected),
        )
    if not is_stacked(x, experts):
        return visit_experts(*operands, expected=expected)
    if x.shape[0] > FEW_ROWS:
        return grouped_experts(*operands, expected=expected)
    from mixtral_jax.kernels.decode_experts import decode_experts

    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(visit_experts, expected=expected),
        default=functools.partial(decode_experts, expected=expected),
    )


def tpu_routed_experts(
    out: Float[Array, "N D"],
    x: Float[Array, "N D"],
    expert_ids: Int[Array, "N A"],
    expert_weights: Float[Array, "N A"],
    valid: Bool[Array, " N"],
    experts: ExpertWeights,
    *,
    expected: float,
) -> Float[Array, "N D"]:
    """``visit_experts`` by grouped products, whatever the number of rows."""
    routed = grouped_experts if is_stacked(x, experts) else visit_experts
    return routed(out, x, expert_ids, expert_weights, valid, experts, expected=expected)


def stacked_blocks(x: Float[Array, "E N D"], experts: ExpertWeights) -> Float[Array, "E N D"]:
    """``expert_blocks`` by batched products."""
    return batched_blocks(x, experts) if is_stacked(x, experts) else expert_blocks(x, experts)


def gpu_blocks(x: Float[Array, "E N D"], experts: ExpertWeights) -> Float[Array, "E N D"]:
    """``expert_blocks`` by batched products, or by Pallas kernels in packed codes."""
    if not all(map(is_widened, experts)):
        return stacked_blocks(x, experts)
    from mixtral_jax.kernels.quantized_experts import quantized_blocks

    return jax.lax.platform_dependent(x, experts, cpu=expert_blocks, default=quantized_blocks)


def gpu_attention(
    q: jax.Array, k: Any, v: Any, queries: jax.Array, keys: jax.Array, *, window: int | None
) -> jax.Array:
    """``blocked_attention`` by a Pallas kernel, where keys and values are arrays like the queries.

    Not cuDNN's: it takes lengths or a bias held whole, where here positions decide.
    """
    operands = (q, k, v, queries, keys)
    if not all(isinstance(x, jax.Array) and x.dtype == q.dtype for x in (k, v)):
        return blocked_attention(*operands, window=window)
    from mixtral_jax.kernels.flash_attention import flash_attention

    return jax.lax.platform_dependent(
        *operands,
        cpu=functools.partial(blocked_attention, window=window),
        default=functools.partial(flash_attention, window=window),
    )
