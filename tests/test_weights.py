"""Every weight kind stands for one matrix: same shape and products, in a module and on a mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mixtral_jax.model.placement import LOCAL
from mixtral_jax.model.transformer import Mixtral, assemble
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.weights import Adapted, ExpertSlots, QTensor, expert_matrices, slots_of, weight
from tests.models import forward, random_leaves, random_tokens

F32 = 1e-4


def quantized(w: jax.Array, groups: int = 1) -> QTensor:
    """Absmax int8 over groups of inputs; the makers proper come with quantization."""
    grouped = w.reshape(*w.shape[:-1], groups, -1)
    scales = jnp.abs(grouped).max(axis=-1) / 127
    codes = jnp.round(grouped / scales[..., None]).astype(jnp.int8).reshape(w.shape)
    return QTensor(codes, scales, "int8", w.dtype)


def adapted(base: jax.Array | QTensor, seed: int = 0) -> Adapted:
    *stack, out, summed = base.shape
    keys = jax.random.split(jax.random.key(seed))
    a = 0.2 * jax.random.normal(keys[0], (*stack, 3, summed))
    b = 0.2 * jax.random.normal(keys[1], (*stack, out, 3))
    return Adapted(base, a, b, 0.5)


def as_array(w) -> jax.Array:
    """What a kind stands for, by its definition."""
    if isinstance(w, Adapted):
        return as_array(w.base) + w.scale * w.b @ w.a
    return w.dequantize() if isinstance(w, QTensor) else w


KINDS = {
    "int8": quantized,
    "int8 in groups": lambda w: quantized(w, 4),
    "adapted": adapted,
    "adapted int8": lambda w: adapted(quantized(w)),
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_products_equal_those_of_the_array(make):
    x, w = (
        jax.random.normal(jax.random.key(0), (2, 5, 8)),
        jax.random.normal(jax.random.key(1), (6, 8)),
    )
    kind = make(w)
    assert (kind.shape, kind.ndim, kind.dtype) == ((6, 8), 2, jnp.float32)
    got = jax.jit(lambda x, kind: LOCAL.contract("BTD,OD->BTO", x, kind))(x, kind)
    np.testing.assert_allclose(got, x @ as_array(kind).T, atol=F32)
    assert not np.allclose(as_array(kind), w, atol=F32)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_model_runs_on_every_kind(small_config, make):
    config = small_config(num_local_experts=4, num_hidden_layers=1, initializer_range=0.2)
    leaves = random_leaves(config)
    kinds = {
        name: make(leaf)
        if leaf.ndim > 1 and "proj" in name + "proj" * ("experts" in name)
        else leaf
        for name, leaf in leaves.items()
    }
    assert sum(not isinstance(leaf, jax.Array) for leaf in kinds.values()) == 7
    tokens = random_tokens(config, (2, 12))
    plain = {name: as_array(leaf) for name, leaf in kinds.items()}
    want = forward(assemble(config, plain), tokens)
    model = assemble(config, kinds)
    np.testing.assert_allclose(forward(model, tokens, placement=LOCAL), want, atol=F32)
    for text in ("1x4", "1x2x2"):
        mesh = MeshSpec.parse(text).build()
        got = forward(place(model, mesh), tokens, placement=MeshPlacement(mesh))
        np.testing.assert_allclose(got, want, atol=F32)


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("make", [lambda w: w, *KINDS.values()], ids=["array", *KINDS])
def test_slots_hold_every_expert_once(shards, make):
    stack = make(jax.random.normal(jax.random.key(0), (8, 6, 8)))
    slots = slots_of(stack, shards)
    assert isinstance(slots, ExpertSlots)
    assert (slots.shape, slots.dtype, slots.ndim) == ((8, 6, 8), jnp.float32, 3)
    for one, other in zip(expert_matrices(slots), expert_matrices(stack), strict=True):
        assert one.shape == other.shape == (6, 8)
        np.testing.assert_array_equal(as_array(one), as_array(other))


def test_kinds_answer_the_ellipsis_and_nothing_else():
    q = quantized(jnp.ones((4, 4)))
    for kind in (q, adapted(q), ExpertSlots((q,))):
        held = nnx.Param(kind)[...]
        assert type(held) is type(kind)
        assert jax.tree.map(np.array_equal, held, kind) == jax.tree.map(lambda _: True, kind)
        with pytest.raises(TypeError, match=r"answers \[\.\.\.\] only"):
            kind[0]  # type: ignore[index]


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ValueError, match="expected one of"):
        dataclasses.replace(quantized(jnp.ones((4, 4))), scheme="int3")


def test_a_weight_names_every_dim():
    with pytest.raises(ValueError, match="expected 2 names"):
        weight(None, (2, 3), ("embed",), dtype=jnp.float32, std=None)


def test_a_frozen_base_gets_no_gradient_but_the_adapter_does(small_config):
    config = small_config(num_local_experts=2, num_hidden_layers=1, initializer_range=0.2)
    leaves = random_leaves(config)
    name = "layers.0.attention.q_proj"
    base = quantized(leaves[name])
    tokens = jnp.asarray(random_tokens(config, (2, 8)))

    def loss(a: jax.Array, b: jax.Array) -> jax.Array:
        model: Mixtral = assemble(config, leaves | {name: Adapted(base, a, b, 0.5)})
        return (model(tokens) ** 2).sum()

    start = adapted(base)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(start.a, start.b)
    assert all(np.abs(g).max() > 0 for g in gradients)
