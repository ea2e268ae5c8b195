"""Weights that training begins with: what they are, and that no mesh changes them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.sharding.fresh import fresh_leaves
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import weight_shardings
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.weights import ExpertSlots, stack_of


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(num_hidden_layers=2, num_local_experts=8, initializer_range=0.05)


def drawn(config, mesh: str = "1x1", seed: int = 0, **how) -> dict[str, np.ndarray]:
    built = MeshSpec.parse(mesh).build()
    leaves = fresh_leaves(config, seed, mesh=built, **{"dtype": "float32", **how})
    return {path: whole(leaf) for path, leaf in leaves.items()}


def whole(leaf) -> np.ndarray:
    return np.asarray(stack_of(leaf) if isinstance(leaf, ExpertSlots) else leaf)


def test_they_are_normal_and_what_writes_to_the_stream_is_smaller(config):
    leaves = drawn(config)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {
        path: spec.shape for path, spec in leaf_specs(config).items()
    }
    for path, leaf in leaves.items():
        if path.endswith("norm.weight"):
            assert (leaf == 1).all(), path
            continue
        is_residual = path.endswith((".o_proj", ".experts.down"))
        std = 0.05 / np.sqrt(2 * 2) if is_residual else 0.05
        # Of a sample of n the deviation is off by std / sqrt(2 n); five times that is never seen.
        assert leaf.std() == pytest.approx(std, rel=5 / np.sqrt(2 * leaf.size)), path
        assert abs(leaf.mean()) < 5 * std / np.sqrt(leaf.size), path


def test_every_weight_is_drawn_by_itself(config):
    one, other = drawn(config), drawn(config, seed=1)
    random = [leaf for path, leaf in one.items() if not path.endswith("norm.weight")]
    first = {leaf.ravel()[0] / leaf.std() for leaf in random}
    assert len({round(float(number), 4) for number in first}) == len(random)
    experts = one["layers.0.moe.experts.gate"]
    assert len({expert.tobytes() for expert in experts}) == len(experts)
    assert not any(np.array_equal(one[p], other[p]) for p in one if "norm" not in p)


@pytest.mark.parametrize("mesh", ["1x8", "2x4", "2x2x2"])
def test_they_are_bit_for_bit_the_same_on_every_mesh_and_in_every_layout(config, mesh):
    one = drawn(config)
    fsdp = drawn(config, mesh, strategy=Strategy(fsdp=True))
    for found in (drawn(config, mesh), drawn(config, mesh, layout="stacked"), fsdp):
        assert found.keys() == one.keys()
        assert all(np.array_equal(found[path], one[path]) for path in one)


def test_a_device_holds_its_part_alone_and_experts_lie_in_slots(config):
    mesh = MeshSpec.parse("2x4").build()
    strategy = Strategy(fsdp=True)
    lie = weight_shardings(leaf_specs(config), mesh, strategy)
    stacked = fresh_leaves(
        config, 0, mesh=mesh, dtype="bfloat16", layout="stacked", strategy=strategy
    )
    arrays = {path: leaf for path, leaf in stacked.items() if isinstance(leaf, jax.Array)}
    assert {path: leaf.sharding for path, leaf in arrays.items()} == lie
    assert {str(leaf.dtype) for leaf in arrays.values()} == {"bfloat16"}
    gate = fresh_leaves(config, 0, mesh=mesh, dtype="bfloat16")["layers.1.moe.experts.gate"]
    assert isinstance(gate, ExpertSlots)
    assert [slot.shape[0] for slot in gate.slots] == [4, 4]
    assert {slot.addressable_shards[0].data.shape[0] for slot in gate.slots} == {1}
