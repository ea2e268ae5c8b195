"""Quantized weights on meshes: every scheme gives the logits of one device, or a refusal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.kernels.experts import ExpertWeights, expert_blocks
from mixtral_jax.model.transformer import Mixtral, assemble, leaf_specs
from mixtral_jax.qtensor import SCHEMES, Nested, QTensor, pack
from mixtral_jax.quantize.makers import Recipe, quantize
from mixtral_jax.quantize.source import is_quantized
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.sharding.quantized import check_groups, take_rows
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.weights import Adapted, Layout
from tests.models import forward, random_leaves, random_tokens
from tests.slow import mostly_slow

F32 = 2e-4
MESHES = ["1x8", "2x4", "1x4x2"]
DATA_FREE = {
    "int8": Recipe(scheme="int8"),
    "fp8": Recipe(scheme="fp8"),
    "int4": Recipe(scheme="int4", group_size=32),
    "int4 asymmetric": Recipe(scheme="int4", symmetric=False),
    "nf4": Recipe(scheme="nf4"),
    "fp4 nested": Recipe(scheme="fp4", double_quant=True),
}
GPTQ = [name for name in SCHEMES if name.startswith("gptq")]


def ordered(w: np.ndarray, scheme: str, seed: int) -> QTensor:
    """Asymmetric round-to-nearest in groups of 32, in a drawn order of the inputs."""
    draw = np.random.default_rng(seed)
    order = np.stack([draw.permutation(w.shape[-1]) for _ in w.reshape(-1, *w.shape[-2:])])
    order = order.reshape(*w.shape[:-2], w.shape[-1]).astype(np.int32)
    groups = np.take_along_axis(w, order[..., None, :], -1).reshape(*w.shape[:-1], -1, 32)
    top = 2 ** SCHEMES[scheme].bits - 1
    low = groups.min(-1, keepdims=True).clip(max=0)
    scales = (groups.max(-1, keepdims=True).clip(min=0) - low) / top
    zeros = np.rint(-low / scales)
    codes = (np.rint(groups / scales) + zeros).clip(0, top).astype(np.uint8).reshape(w.shape)
    return QTensor(
        pack(scheme, codes),
        scales[..., 0],
        scheme,
        w.dtype,
        zeros=zeros[..., 0].astype(np.uint8),
        order=order,
    )


def quantized(name: str, leaves: dict[str, jax.Array], config) -> dict:
    specs = leaf_specs(config)
    made = {}
    for i, (path, leaf) in enumerate(leaves.items()):
        w = np.asarray(leaf)
        if not is_quantized(specs[path]):
            made[path] = leaf
        elif name in DATA_FREE:
            made[path] = jax.tree.map(jnp.asarray, quantize(w, DATA_FREE[name]))
        else:
            made[path] = jax.tree.map(jnp.asarray, ordered(w, name, seed=i))
    return made


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(
        hidden_size=128,
        head_dim=32,
        intermediate_size=256,
        num_hidden_layers=1,
        initializer_range=0.2,
    )


@pytest.fixture(scope="module")
def leaves(config):
    return random_leaves(config)


@pytest.mark.parametrize("layout", mostly_slow(["slots", "stacked"], ["slots"]))
@pytest.mark.parametrize("name", mostly_slow([*DATA_FREE, *GPTQ], ["nf4", "gptq3"]))
def test_logits_equal_those_of_the_dequantized_on_every_mesh(config, leaves, name, layout: Layout):
    made = quantized(name, leaves, config)
    assert sum(isinstance(w, QTensor) for w in made.values()) == 7
    tokens = random_tokens(config, (16, 3))
    plain = {p: w.dequantize() if isinstance(w, QTensor) else w for p, w in made.items()}
    want = forward(assemble(config, plain), tokens)
    assert not np.allclose(want, forward(assemble(config, leaves), tokens), atol=F32)
    model = assemble(config, made)
    meshes = MESHES if layout == "slots" else ["1x4x2"]
    for text in meshes:
        mesh = MeshSpec.parse(text).build()
        got = forward(place(model, mesh, layout=layout), tokens, placement=MeshPlacement(mesh))
        np.testing.assert_allclose(got, want, atol=F32)


@pytest.mark.parametrize(
    "name", mostly_slow(["int8", "int4 asymmetric", "nf4", "gptq4"], ["gptq4"])
)
def test_attention_split_over_heads_and_weights_over_data(config, leaves, name):
    made = quantized(name, leaves, config)
    tokens = random_tokens(config, (16, 3))
    plain = {p: w.dequantize() if isinstance(w, QTensor) else w for p, w in made.items()}
    want = forward(assemble(config, plain), tokens)
    mesh, strategy = MeshSpec.parse("2x2").build(), Strategy(attention="tensor")
    placement = MeshPlacement(mesh, strategy=strategy)
    model = place(assemble(config, made), mesh, strategy=strategy)
    np.testing.assert_allclose(forward(model, tokens, placement=placement), want, atol=F32)


def parts(w: QTensor) -> list[jax.Array]:
    return jax.tree.leaves(w)


def test_scales_lie_with_their_weights(config, leaves):
    mesh = MeshSpec.parse("1x2x2").build()
    model: Mixtral = place(
        assemble(config, quantized("int4 asymmetric", leaves, config)), mesh, layout="stacked"
    )
    experts = model.layers[0].moe.experts
    for leaf in (experts.gate, experts.down):
        for part in parts(leaf[...]):
            assert part.addressable_shards[0].data.size * 4 == part.size


def test_nested_scales_are_computed_where_a_matrix_is_split_and_kept_elsewhere(config, leaves):
    made = assemble(config, quantized("fp4 nested", leaves, config))
    for text, is_nested in (("1x4", True), ("1x2x2", False)):
        model = place(made, MeshSpec.parse(text).build(), layout="stacked")
        for leaf in (model.layers[0].moe.experts.down, model.layers[0].attention.q_proj):
            assert isinstance(leaf[...].scales, Nested) == is_nested


def test_an_order_of_hidden_channels_moves_into_gate_and_up(config, leaves):
    made = quantized("gptq4", leaves, config)
    mesh = MeshSpec.parse("1x2x2").build()
    model = place(assemble(config, made), mesh, layout="stacked")
    experts = model.layers[0].moe.experts
    before = made["layers.0.moe.experts.down"]
    assert before.order is not None
    assert experts.down[...].order is None
    want = take_rows(made["layers.0.moe.experts.gate"], before.order)
    for got, part in zip(parts(experts.gate[...]), parts(want), strict=True):
        np.testing.assert_array_equal(got, part)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 128)), jnp.float32)
    names = [f"layers.0.moe.experts.{name}" for name in ("gate", "up", "down")]
    one = expert_blocks(x, ExpertWeights(*(made[name] for name in names)))
    moved = ExpertWeights(*(experts.weights()))
    np.testing.assert_allclose(expert_blocks(x, moved), one, atol=1e-3)


def test_an_order_is_kept_where_nothing_is_split(config, leaves):
    made = quantized("gptq4", leaves, config)
    model = place(assemble(config, made), MeshSpec.parse("1x4").build(), layout="stacked")
    down = model.layers[0].moe.experts.down[...]
    np.testing.assert_array_equal(down.order, made["layers.0.moe.experts.down"].order)


@pytest.mark.parametrize(("name", "parts"), [("nf4", 8), ("int4", 16), ("gptq3", 64)])
def test_groups_that_would_be_cut_are_refused(config, leaves, name, parts):
    down = quantized(name, leaves, config)["layers.0.moe.experts.down"]
    with pytest.raises(MixtralError, match="a smaller group size, or int8") as refusal:
        check_groups("down", down, parts)
    assert refusal.value.code == BAD_CONFIG
    check_groups("down", down, 4)
    check_groups("down", quantized("int8", leaves, config)["layers.0.moe.experts.down"], parts)


def test_a_mesh_that_would_cut_groups_is_refused(config, leaves):
    model = assemble(config, quantized("nf4", leaves, config))
    with pytest.raises(MixtralError, match="whole groups in each of 8 parts"):
        place(model, MeshSpec.parse("1x1x8").build())


@pytest.mark.parametrize("layout", mostly_slow(["stacked", "slots"], ["stacked"]))
def test_an_order_moves_the_factors_of_an_adapter_too(config, leaves, layout: Layout):
    draw = np.random.default_rng(3)
    made = quantized("gptq4", leaves, config)
    for name in ("gate", "up", "down"):
        path = f"layers.0.moe.experts.{name}"
        *_, outputs, inputs = made[path].shape
        a, b = draw.normal(size=(8, 4, inputs)), draw.normal(size=(8, outputs, 4))
        a, b = (jnp.asarray(part * 0.1, jnp.float32) for part in (a, b))
        made[path] = Adapted(made[path], a, b, 1.0)
    model, tokens = assemble(config, made), random_tokens(config, (16, 3))
    want = forward(model, tokens)
    mesh = MeshSpec.parse("1x2x2").build()
    split = place(model, mesh, layout=layout)
    down = split.layers[0].moe.experts.down[...]
    down = down.slots[0] if layout == "slots" else down
    assert isinstance(down, Adapted)
    assert down.base.order is None
    got = forward(split, tokens, placement=MeshPlacement(mesh))
    np.testing.assert_allclose(got, want, atol=F32)
    plain = assemble(config, quantized("gptq4", leaves, config))
    assert np.abs(np.asarray(forward(plain, tokens)) - want).max() > 100 * F32
