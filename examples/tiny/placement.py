"""Where training runs: one device's rows, packed documents, experts with a capacity."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from mixtral_jax.kernels.attention import attends
from mixtral_jax.kernels.experts import feed_forward
from mixtral_jax.kernels.scaled_kv import KV, ScaledKV
from mixtral_jax.model.placement import Routed, Routing


@dataclasses.dataclass(frozen=True, eq=False)
class PackedPlacement:
    """A Placement for one trace of the loss.

    Attributes:
        segments: int ``[B, T]``, the document of each token; tokens see their own document only.
        capacity_factor: rows of each expert, as a multiple of a balanced load. Assignments beyond
            it are dropped, and counted; generation drops none.
    """

    segments: jax.Array
    capacity_factor: float
    kernels: str = "reference"  # of the cache, which training has none of

    def contract(self, einsum: str, x: jax.Array, w: Any, *, dtype: Any = None) -> jax.Array:
        """One flat product, which XLA's CPU backend runs faster than a batched one."""
        del einsum  # always x @ w.T
        product = x.reshape(-1, x.shape[-1]) @ w.T
        return product.reshape(*x.shape[:-1], w.shape[0]).astype(dtype or x.dtype)

    def lookup(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Rows of the embedding."""
        return table[ids]

    def attention(
        self,
        q: jax.Array,
        k: KV,
        v: KV,
        queries: jax.Array,
        keys: jax.Array,
        *,
        window: int | None,
    ) -> jax.Array:
        """Softmax attention within each document."""
        assert not isinstance(k, ScaledKV), "training has no cache"
        assert not isinstance(v, ScaledKV), "training has no cache"
        B, T, H, C = q.shape
        q = q.transpose(0, 2, 1, 3).reshape(B * H, T, C)
        k, v = (jnp.repeat(x, H // x.shape[1], axis=1).reshape(B * H, T, C) for x in (k, v))
        mask = attends(queries, keys, window) & (
            self.segments[:, :, None] == self.segments[:, None, :]
        )
        scores = jnp.einsum("NTC,NSC->NTS", q, k).reshape(B, H, T, T) * C**-0.5
        scores = jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min)
        shares = jax.nn.softmax(scores, axis=-1).reshape(B * H, T, T)
        out = jnp.einsum("NTS,NSC->NTC", shares, v).reshape(B, H, T, C)
        return out.transpose(0, 2, 1, 3)

    def experts(
        self, x: jax.Array, routing: Routing, weights: Any, adapter_id: Any = None
    ) -> Routed:
        """Each expert on as many rows as it has room for, first choices before second."""
        del adapter_id
        (N, A), E = routing.expert_ids.shape, weights.gate.shape[0]
        room = min(N, 8 * math.ceil(self.capacity_factor * N * A / E / 8))
        # [A * N]: all first choices, then all second choices.
        expert_ids = jnp.where(routing.valid[:, None], routing.expert_ids, E).T.reshape(-1)
        is_expert = expert_ids[:, None] == jnp.arange(E)
        place = ((jnp.cumsum(is_expert, axis=0) - 1) * is_expert).sum(axis=1)
        fits = (place < room) & (expert_ids < E)
        slot = jnp.where(fits, expert_ids * room + place, E * room)
        assignment = jnp.full((E * room + 1,), A * N).at[slot].set(jnp.arange(A * N))[:-1]
        row = jnp.where(assignment < A * N, assignment % N, N)
        sent = take(x, row, slot.reshape(A, N)).reshape(E, room, -1)
        parts = [
            feed_forward(sent[e], weights.gate[e], weights.up[e], weights.down[e]) for e in range(E)
        ]
        back = take(jnp.concatenate(parts), slot, assignment[None])
        shares = routing.expert_weights.T.reshape(-1, 1)
        y = (back * shares).reshape(A, N, -1).sum(axis=0)
        dropped = (~fits & (expert_ids < E)).sum().astype(jnp.int32)
        return Routed(y, dropped, dropped)

    def constrain(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """No mesh here."""
        del axes
        return x


@jax.custom_vjp
def take(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
    """Rows of ``x`` by index, zeros for an index past the end.

    ``inverse[:, i]`` lists where row i went, so that the gradient is gathered too (XLA's CPU
    backend scatters slowly).
    """
    del inverse
    return x.at[index].get(mode="fill", fill_value=0)


def _take(x: jax.Array, index: jax.Array, inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
    return take(x, index, inverse), inverse


def _take_gradient(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None, None]:
    return gradient.at[inverse].get(mode="fill", fill_value=0).sum(axis=0), None, None


take.defvjp(_take, _take_gradient)
