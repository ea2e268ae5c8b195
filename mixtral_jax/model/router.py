"""The router: which experts each token goes to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mixtral_jax.model.placement import Routing


def route(logits: Float[Array, "N E"], valid: Bool[Array, " N"], *, top_k: int) -> Routing:
    """Softmax over all experts, the best ``top_k``, renormalised to sum to one.

    As MixtralTopKRouter of transformers; equal to a softmax over the chosen logits. Ties go to the
    lowest expert id.

    Args:
        logits: router logits in the activation dtype.
        valid: false for padding rows.
        top_k: experts per token (A).

    Returns:
        Routing with f32 weights.
    """
    # f32: eight bf16 probabilities tie often, and a tie broken differently is another expert.
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    chosen, expert_ids = jax.lax.top_k(probabilities, top_k)
    return Routing(expert_ids, chosen / chosen.sum(axis=-1, keepdims=True), valid)
