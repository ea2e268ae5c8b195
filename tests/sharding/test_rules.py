"""The rules table is total, and refuses what cannot be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mixtral_jax.model.axes import WEIGHT_AXES
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import weight_shardings
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.rules import WEIGHT_RULES, batch_axes, kind_specs, partition_spec
from mixtral_jax.weights import Adapted, QTensor, slots_of


def test_every_weight_axis_has_a_rule(small_config):
    used = {axis for spec in leaf_specs(small_config()).values() for axis in spec.axes}
    assert used == set(WEIGHT_RULES) == set(WEIGHT_AXES)


def test_unknown_axis_is_an_error():
    with pytest.raises(ValueError, match="logical axis 'colour'"):
        partition_spec(("embed", "colour"), WEIGHT_RULES)


def test_two_dims_on_one_mesh_axis_is_an_error():
    with pytest.raises(ValueError, match="both map to mesh axis 'tensor'"):
        partition_spec(("vocab", "mlp"), WEIGHT_RULES)


def test_experts_lie_on_the_expert_axis(small_config):
    mesh = MeshSpec.parse("1x4x2").build()
    shardings = weight_shardings(leaf_specs(small_config()), mesh)
    gate, down = "layers.0.moe.experts.gate", "layers.0.moe.experts.down"
    assert shardings[gate].spec == PartitionSpec("expert", "tensor", None)
    assert shardings[down].spec == PartitionSpec("expert", None, "tensor")
    assert shardings["norm.weight"].spec == PartitionSpec(None)


@pytest.mark.parametrize(
    ("rows", "axes"),
    [(16, ("data", "expert")), (8, ("data",)), (2, ("data",)), (12, ("data",))],
)
def test_no_device_is_left_with_one_row(rows, axes):
    assert batch_axes(rows, MeshSpec.parse("2x4").build()) == axes


def test_rows_must_divide_the_data_axis():
    with pytest.raises(ValueError, match="a multiple of the data axis"):
        batch_axes(3, MeshSpec.parse("2x4").build())


def test_constrain_places_an_activation():
    mesh = MeshSpec.parse("2x2").build()
    placement = MeshPlacement(mesh)
    x = jax.jit(lambda x: placement.constrain(x, ("batch", "length")))(jnp.zeros((2, 3)))
    assert x.sharding.spec == PartitionSpec("data")
    with pytest.raises(ValueError, match="logical axis 'colour'"):
        placement.constrain(jnp.zeros((2,)), ("colour",))


def test_every_weight_kind_has_specs():
    base, spec = jnp.zeros((4, 6, 8)), PartitionSpec("expert", "tensor", None)
    quantized = QTensor(jnp.zeros((4, 6, 8), jnp.int8), jnp.ones((4, 6, 1)), "int8", jnp.float32)
    adapted = Adapted(quantized, jnp.zeros((4, 2, 8)), jnp.zeros((4, 6, 2)), 0.5)
    specs = kind_specs(slots_of(adapted, 2), spec)
    assert len(specs.slots) == 2
    assert specs.slots[0].a == PartitionSpec("expert", None, None)
    assert specs.slots[0].b == PartitionSpec("expert", "tensor", None)
    assert specs.slots[0].base.codes == spec
    assert kind_specs(base, spec) == spec
