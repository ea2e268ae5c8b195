"""MeshPlacement: the Placement of a device mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.scaled_kv import KV
from mixtral_jax.kernels.table import DEFAULT_KERNELS, KERNELS
from mixtral_jax.model.cache import KV_AXES
from mixtral_jax.model.placement import Routed, Routing, refuse_adapter_ids
from mixtral_jax.sharding.dispatch import DispatchOptions, dispatch
from mixtral_jax.sharding.rules import MIN_ROWS_PER_DEVICE, batch_axes, partition_spec
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.weights import Matrix


@dataclasses.dataclass(frozen=True)
class MeshPlacement:
    """Attention placed by the compiler from the rules; experts dispatched by hand.

    Attributes:
        mesh: axes data, expert, tensor (see ``MeshSpec.build``).
        dispatch: how rows travel to their experts.
        kernels: a row of the kernels table.
        strategy: how attention is placed.
        min_rows: of a device, where rows spread over the expert axis too; one is enough for
            training, whose rows are many tokens.
    """

    mesh: Mesh
    dispatch: DispatchOptions = dataclasses.field(default_factory=DispatchOptions)
    kernels: str = DEFAULT_KERNELS
    strategy: Strategy = dataclasses.field(default_factory=Strategy)
    min_rows: int = MIN_ROWS_PER_DEVICE

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
        """See Placement. Each device attends with its own heads to the keys of its own rows."""
        kernel = functools.partial(KERNELS[self.kernels].attention, window=window)
        rows = self._spec(q, ("batch", "length", "heads", "channels"))
        slots = jax.tree.map(lambda x: self._spec(x, KV_AXES[: x.ndim]), k)
        places = self._spec(keys, ("batch", "slots"))
        return jax.shard_map(
            kernel,
            mesh=self.mesh,
            in_specs=(rows, slots, slots, self._spec(queries, ("batch", "length")), places),
            out_specs=rows,
        )(q, k, v, queries, keys)

    def experts(
        self,
        x: Float[Array, "N D"],
        routing: Routing,
        weights: ExpertWeights,
        adapter_id: Int[Array, " N"] | None = None,
    ) -> Routed:
        """See Placement."""
        refuse_adapter_ids(adapter_id)
        kernels = KERNELS[self.kernels]
        return dispatch(x, routing, weights, mesh=self.mesh, options=self.dispatch, kernels=kernels)

    def constrain(self, x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """See Placement."""
        sharding = NamedSharding(self.mesh, self._spec(x, axes))
        return jax.lax.with_sharding_constraint(x, sharding)

    def _spec(self, x: jax.Array, axes: tuple[str, ...]) -> PartitionSpec:
        rules = self.strategy.activation_rules()
        if "batch" in axes:
            may_spread = self.strategy.attention == "data"
            rows = x.shape[axes.index("batch")]
            axes_of_rows = batch_axes(
                rows, self.mesh, may_spread=may_spread, min_rows=self.min_rows
            )
            rules = {**rules, "batch": axes_of_rows}
        return partition_spec(axes, rules)
