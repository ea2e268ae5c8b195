"""The sparse mixture-of-experts layer: a router and experts, sent through a Placement."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels.experts import ExpertWeights
from mixtral_jax.model.placement import Placement, Routing
from mixtral_jax.model.router import route
from mixtral_jax.weights import weight


class MoEOutput(NamedTuple):
    """Result of one layer, with how its rows were routed and how many assignments were dropped.

    ``overflowed`` counts those beyond the capacity. ``router_logits`` are over
    all experts, in the activation dtype.
    """

    y: Float[Array, "B T D"]
    router_logits: Float[Array, "N E"]
    routing: Routing
    dropped: Int[Array, ""]
    overflowed: Int[Array, ""]


class Choice(NamedTuple):
    """The rows that go to experts, and where each goes."""

    rows: Float[Array, "N D"]
    logits: Float[Array, "N E"]
    routing: Routing


class Router(nnx.Module):
    """A linear map from a token to one logit per expert."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, dtype: Any):
        E, D, std = config.num_local_experts, config.hidden_size, config.initializer_range
        self.top_k = config.num_experts_per_tok
        self.weight = weight(key, (E, D), ("router_expert", "embed"), dtype=dtype, std=std)

    def __call__(self, x: Float[Array, "N D"], placement: Placement) -> Float[Array, "N E"]:
        """Logits of every row."""
        return placement.contract("ND,ED->NE", x, self.weight[...])


class Experts(nnx.Module):
    """The stacked weights of a layer's experts; the Placement decides where they are applied."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, dtype: Any):
        E, D, F = config.num_local_experts, config.hidden_size, config.intermediate_size
        keys = jax.random.split(key, 3)
        std = config.initializer_range
        self.gate = weight(keys[0], (E, F, D), ("expert", "mlp", "embed"), dtype=dtype, std=std)
        self.up = weight(keys[1], (E, F, D), ("expert", "mlp", "embed"), dtype=dtype, std=std)
        self.down = weight(keys[2], (E, D, F), ("expert", "embed", "mlp"), dtype=dtype, std=std)

    def weights(self) -> ExpertWeights:
        """The three leaves."""
        return ExpertWeights(self.gate[...], self.up[...], self.down[...])


class SparseMoE(nnx.Module):
    """Router and experts."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, dtype: Any):
        router_key, experts_key = jax.random.split(key)
        self.router = Router(config, key=router_key, dtype=dtype)
        self.experts = Experts(config, key=experts_key, dtype=dtype)

    def __call__(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], placement: Placement
    ) -> MoEOutput:
        """Applies each token's experts; padding gets zeros."""
        choice = self.choose(x, valid, placement)
        routed = placement.experts(choice.rows, choice.routing, self.experts.weights())
        y = routed.y.reshape(x.shape)
        return MoEOutput(y, choice.logits, choice.routing, routed.dropped, routed.overflowed)

    def choose(
        self, x: Float[Array, "B T D"], valid: Bool[Array, "B T"], placement: Placement
    ) -> Choice:
        """What the router says of each token; needs no expert."""
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows, placement)
        return Choice(rows, logits, route(logits, valid.reshape(-1), top_k=self.router.top_k))
