"""MeshPlacement: the Placement of a device mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.kernels.table import DEFAULT_KERNELS, KERNELS
from mixtral_jax.model.placement import Routed, Routing, refuse_adapter_ids
from mixtral_jax.sharding.dispatch import DispatchOptions, dispatch
from mixtral_jax.sharding.rules import ACTIVATION_RULES, batch_axes, partition_spec
from mixtral_jax.weights import Matrix


@dataclasses.dataclass(frozen=True)
class MeshPlacement:
    """Attention placed by the compiler from the rules; experts dispatched by hand.

    Attributes:
        mesh: axes data, expert, tensor (see ``MeshSpec.build``).
        dispatch: how rows travel to their experts.
        kernels: a row of the kernels table.
    """

    mesh: Mesh
    dispatch: DispatchOptions = dataclasses.field(default_factory=DispatchOptions)
    kernels: str = DEFAULT_KERNELS

    def contract(self, einsum: str, x: jax.Array, w: Matrix, *, dtype: Any = None) -> jax.Array:
        """See Placement."""
        return KERNELS[self.kernels].contract(einsum, x, w, dtype=dtype)

    def attention(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        """See Placement."""
        return KERNELS[self.kernels].attention(q, k, v, mask)

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
        rules = ACTIVATION_RULES
        if "batch" in axes:
            rules = {**rules, "batch": batch_axes(x.shape[axes.index("batch")], self.mesh)}
        sharding = NamedSharding(self.mesh, partition_spec(axes, rules))
        return jax.lax.with_sharding_constraint(x, sharding)
