"""What the routers did: loads, entropy, overflow. No extra pass; counts are reduced once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mixtral_jax.model.transformer import Hidden


class RouterStats(NamedTuple):
    """Of one call, per layer, over all devices.

    Attributes:
        load: assignments that each expert got.
        entropy: mean over the rows of the entropy of the router's distribution, in nats; ln E is
            a router that knows nothing.
        overflow_rate: share of the assignments beyond the capacity.
        drop_rate: share of the assignments left out.
    """

    load: Int[Array, "L E"]
    entropy: Float[Array, " L"]
    overflow_rate: Float[Array, " L"]
    drop_rate: Float[Array, " L"]


def router_stats(hidden: Hidden) -> RouterStats:
    """Reduces what every layer gave; padding counts nowhere. Use it inside the same jit."""
    logits = jnp.stack(hidden.router_logits).astype(jnp.float32)  # [L, N, E]
    ids = jnp.stack([layer.expert_ids for layer in hidden.routing])  # [L, N, A]
    valid = hidden.routing[0].valid
    chosen = jax.nn.one_hot(ids, logits.shape[-1], dtype=jnp.int32).sum(axis=2)
    logs = jax.nn.log_softmax(logits)
    entropy = jnp.where(valid, -(jnp.exp(logs) * logs).sum(axis=-1), 0.0)
    load = (chosen * valid[:, None]).sum(axis=1)
    rows = jnp.maximum(valid.sum(), 1)
    assignments = rows * ids.shape[-1]
    return RouterStats(
        load,
        entropy.sum(axis=1) / rows,
        hidden.overflowed / assignments,
        hidden.dropped / assignments,
    )
