"""The seam between the maths and the machine: what a layer asks of wherever it runs."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.scaled_kv import KV
from mixtral_jax.kernels.table import DEFAULT_KERNELS, KERNELS
from mixtral_jax.model.cache import KV_AXES
from mixtral_jax.weights import Matrix


class Routing(NamedTuple):
    """Which experts each row goes to, and with what weight.

    ``valid`` is false for padding rows, which go nowhere.
    """

    expert_ids: Int[Array, "N A"]
    expert_weights: Float[Array, "N A"]
    valid: Bool[Array, " N"]


class Routed(NamedTuple):
    """What came back from the experts.

    Over all devices: ``dropped`` counts the (row, expert) assignments that were left out,
    ``overflowed`` those beyond the capacity, which are dropped or took the dropless path.
    """

    y: Float[Array, "N D"]
    dropped: Int[Array, ""]
    overflowed: Int[Array, ""]


@runtime_checkable
class Placement(Protocol):
    """Where operations run. Implementations are hashable: they are static arguments of jit."""

    @property
    def kernels(self) -> str:
        """The row of the kernels table."""
        ...

    def contract(self, einsum: str, x: jax.Array, w: Matrix, *, dtype: Any = None) -> jax.Array:
        """A product with one weight, ``kernels/contract.py``."""
        ...

    def lookup(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """Rows of an embedding, ``kernels/rows.py``."""
        ...

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
        """Grouped-query attention, ``kernels/attention.py``."""
        ...

    def experts(
        self,
        x: Float[Array, "N D"],
        routing: Routing,
        weights: ExpertWeights,
        adapter_id: Int[Array, " N"] | None = None,
    ) -> Routed:
        """Sends rows to their experts and brings the weighted sums back, in the dtype of ``x``."""
        ...

    def constrain(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """States the logical axes of an activation; the identity where there is no mesh."""
        ...


@dataclasses.dataclass(frozen=True)
class LocalPlacement:
    """One device: no collectives, nothing ever dropped."""

    kernels: str = DEFAULT_KERNELS

    def contract(self, einsum: str, x: jax.Array, w: Matrix, *, dtype: Any = None) -> jax.Array:
        """See Placement."""
        return KERNELS[self.kernels].contract(einsum, x, w, dtype=dtype)

    def lookup(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        """See Placement."""
        return KERNELS[self.kernels].lookup(table, ids)

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
        """See Placement."""
        return KERNELS[self.kernels].attention(q, k, v, queries, keys, window=window)

    def experts(
        self,
        x: Float[Array, "N D"],
        routing: Routing,
        weights: ExpertWeights,
        adapter_id: Int[Array, " N"] | None = None,
    ) -> Routed:
        """See Placement."""
        refuse_adapter_ids(adapter_id)
        out = jnp.zeros(x.shape, jnp.float32)
        expected = routing.expert_ids.size / weights.gate.shape[0]
        y = KERNELS[self.kernels].routed_experts(out, x, *routing, weights, expected=expected)
        return Routed(y.astype(x.dtype), jnp.int32(0), jnp.int32(0))

    def constrain(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """See Placement."""
        assert x.ndim == len(axes), (x.shape, axes)
        return x


def constrain_kv(kv: KV, placement: Placement) -> KV:
    """States the axes of a layer's keys or values; scales lie as their codes."""
    return jax.tree.map(lambda x: placement.constrain(x, KV_AXES[: x.ndim]), kv)


def refuse_adapter_ids(adapter_id: jax.Array | None) -> None:
    """Adapters per row need stacked adapter weights, which no maker produces yet."""
    if adapter_id is not None:
        raise NotImplementedError("adapter_id: one adapter for all rows is what Adapted supports")


LOCAL = LocalPlacement()
