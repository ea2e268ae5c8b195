"""Shardings of weights, and models put onto a mesh."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from mixtral_jax.model.transformer import LeafSpec, Mixtral, assemble, leaf_specs
from mixtral_jax.sharding.quantized import check_split, make_ready
from mixtral_jax.sharding.rules import kind_specs, partition_spec
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.weights import AXES_KEY, Layout, Weight, slots_of, takes_slots

DEFAULT = Strategy()


def weight_shardings(
    specs: Mapping[str, LeafSpec], mesh: Mesh, strategy: Strategy = DEFAULT
) -> dict[str, NamedSharding]:
    """The sharding of every leaf at rest, by its path."""
    rules = strategy.rest_rules()
    return {
        path: NamedSharding(mesh, partition_spec(spec.axes, rules)) for path, spec in specs.items()
    }


def gather_weights(model: Mixtral, mesh: Mesh, strategy: Strategy) -> Mixtral:
    """Inside jit: the weights where they are used. With fsdp an all-gather each, over data.

    The transpose adds gradients up over data and leaves each device its part.
    """
    rules = strategy.weight_rules()
    gathered = {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        leaf, axes = param[...], param.get_metadata()[AXES_KEY]
        specs = kind_specs(leaf, partition_spec(axes, rules))
        gathered[".".join(map(str, path))] = jax.tree.map(
            lambda part, spec: jax.lax.with_sharding_constraint(part, NamedSharding(mesh, spec)),
            leaf,
            specs,
        )
    return assemble(model.config, gathered)


def place_weight(w: Weight, sharding: NamedSharding) -> Weight:
    """Puts a weight of any kind where ``sharding`` says its ``[..., O, I]`` dims lie."""
    specs = kind_specs(w, sharding.spec)
    return jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(sharding.mesh, spec)), w, specs
    )


def place(
    model: Mixtral, mesh: Mesh, *, layout: Layout = "slots", strategy: Strategy = DEFAULT
) -> Mixtral:
    """Puts a model in memory onto a mesh, its experts in the layout of the kernels to come.

    Raises:
        MixtralError: exit code 78 for quantized weights that the mesh cannot split.
    """
    shardings = weight_shardings(leaf_specs(model.config), mesh, strategy)
    placed = {}
    for path, param in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        leaf = param[...]
        if layout == "slots" and takes_slots(leaf):
            leaf = slots_of(leaf, mesh.shape["expert"])
        check_split(name, leaf, shardings[name])
        placed[name] = place_weight(leaf, shardings[name])
    return assemble(model.config, make_ready(placed, shardings))
