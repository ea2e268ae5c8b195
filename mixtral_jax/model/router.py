"""The router: which experts each token goes to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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
    expert_ids = _best(probabilities, top_k)
    chosen = jnp.take_along_axis(probabilities, expert_ids, axis=1)
    return Routing(expert_ids, chosen / chosen.sum(axis=-1, keepdims=True), valid)


def _best(values: Float[Array, "N E"], count: int) -> Int[Array, "N A"]:
    """As ``jax.lax.top_k``, whose rows the compiler would gather onto every device."""
    columns = jnp.arange(values.shape[1], dtype=jnp.int32)
    left, found = values, []
    for _ in range(count):
        best = jnp.argmax(left, axis=1).astype(jnp.int32)
        found.append(best)
        left = jnp.where(columns == best[:, None], -jnp.inf, left)
    return jnp.stack(found, axis=1)
