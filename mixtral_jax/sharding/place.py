"""Shardings of weights, and models put onto a mesh."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mixtral_jax.model.transformer import LeafSpec, Mixtral, assemble, leaf_specs
from mixtral_jax.sharding.rules import WEIGHT_RULES, kind_specs, partition_spec
from mixtral_jax.weights import Weight, slots_of


def weight_shardings(specs: Mapping[str, LeafSpec], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every leaf, by its path."""
    return {
        path: NamedSharding(mesh, partition_spec(spec.axes, WEIGHT_RULES))
        for path, spec in specs.items()
    }


def place_weight(w: Weight, sharding: NamedSharding) -> Weight:
    """Puts a weight of any kind where ``sharding`` says its ``[..., O, I]`` dims lie."""
    specs = kind_specs(w, sharding.spec)
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(sharding.mesh, spec)), w, specs
    )


def place(model: Mixtral, mesh: Mesh, *, slots: bool = True) -> Mixtral:
    """Puts a model in memory onto a mesh; ``slots`` lays experts out as whole arrays."""
    shardings = weight_shardings(leaf_specs(model.config), mesh)
    placed = {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        leaf = param[...]
        if slots and leaf.ndim == 3:
            leaf = slots_of(leaf, mesh.shape["expert"])
        placed[name] = place_weight(leaf, shardings[name])
    return assemble(model.config, placed)
