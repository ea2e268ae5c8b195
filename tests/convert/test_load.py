"""Loading: any folder onto any mesh bit-exact, each device at the cost of its own rows."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from mixtral_jax.config import config_to_dict
from mixtral_jax.convert import convert, is_checkpoint, load_weights
from mixtral_jax.convert.names import EXPERT_LEAF, Chunk
from mixtral_jax.convert.orbax_leaves import chunk_path
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.model.transformer import assemble
from mixtral_jax.weights import ExpertSlots, slots_of
from tests.convert import checkpoints, native

MESHES = [(1, 8, 1), (8, 1, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (1, 1, 8), (1, 1, 1)]
SPECS = {
    "gate": P("expert", "tensor", None),
    "up": P("expert", "tensor", None),
    "down": P("expert", None, "tensor"),
    "q_proj": P("tensor", None),
    "o_proj": P(None, "tensor"),
    "embed_tokens": P("tensor", None),
}


def sharding_on(shape):
    devices = jax.devices()[: int(np.prod(shape))]
    axes = (AxisType.Auto,) * 3
    mesh = jax.make_mesh(shape, ("data", "expert", "tensor"), axis_types=axes, devices=devices)
    return lambda path: NamedSharding(mesh, SPECS.get(path.split(".")[-1], P()))


def one_device(path):
    return SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module", params=["published", "orbax", "fused", "native_stacked"])
def folder(request, config, tensors, original, converted, tmp_path_factory):
    if request.param == "fused":
        path = tmp_path_factory.mktemp("fused") / "hf"
        return checkpoints.write(path, config, checkpoints.fused(tensors, config), num_files=2)
    if request.param == "native_stacked":
        path = tmp_path_factory.mktemp("native") / "src"
        return native.write_layout(request.param, path, config, tensors)
    return {"published": original, "orbax": converted}[request.param]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_every_mesh_holds_the_same_bits(folder, config, tensors, shape):
    sharding_of = sharding_on(shape)
    loaded = load_weights(
        folder, config, sharding_of=sharding_of, layout="stacked", expert_shards=shape[1]
    )
    expected = checkpoints.leaves(tensors, config)
    assert loaded.keys() == expected.keys()
    for leaf, w in expected.items():
        array = loaded[leaf]
        assert isinstance(array, jax.Array)
        assert array.sharding == sharding_of(leaf)
        assert checkpoints.same_bits(array, w), leaf


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_slots_are_the_stack_laid_out_for_the_expert_shards(folder, config, tensors, shape):
    sharding_of = sharding_on(shape)
    loaded = load_weights(folder, config, sharding_of=sharding_of, expert_shards=shape[1])
    for leaf, w in checkpoints.leaves(tensors, config).items():
        if not EXPERT_LEAF.fullmatch(leaf):
            assert checkpoints.same_bits(loaded[leaf], w), leaf
            continue
        slots, expected = loaded[leaf], slots_of(jnp.asarray(w), shape[1])
        assert isinstance(slots, ExpertSlots)
        assert len(slots.slots) == config.num_local_experts // shape[1]
        for found, wanted in zip(slots.slots, expected.slots, strict=True):
            assert found.sharding.is_equivalent_to(sharding_of(leaf), found.ndim)
            assert checkpoints.same_bits(found, wanted), leaf


def test_the_model_takes_what_was_loaded(folder, config):
    model = assemble(config, load_weights(folder, config, sharding_of=one_device))
    logits = jax.jit(lambda model, tokens: model(tokens))(model, np.zeros((1, 3), np.int32))
    assert np.isfinite(logits).all()


def test_each_device_costs_its_own_experts_and_replicas_are_read_once(folder, config, tensors):
    reads = Counter()
    load_weights(folder, config, sharding_of=sharding_on((1, 8, 1)), expert_shards=8, reads=reads)
    by_device, replicated = Counter(), 0
    for (leaf, devices), num_bytes in reads.items():
        if EXPERT_LEAF.fullmatch(leaf):
            assert len(devices) == 1
            by_device[devices[0]] += num_bytes
        else:
            assert len(devices) == 8
            replicated += num_bytes
    sizes = {leaf: w.nbytes for leaf, w in checkpoints.leaves(tensors, config).items()}
    experts = sum(size for leaf, size in sizes.items() if EXPERT_LEAF.fullmatch(leaf))
    assert by_device == dict.fromkeys(range(8), experts // 8)
    assert replicated == sum(sizes.values()) - experts


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_no_byte_is_read_twice(folder, config, tensors, shape):
    reads, progress = Counter(), []
    load_weights(
        folder,
        config,
        sharding_of=sharding_on(shape),
        expert_shards=shape[1],
        reads=reads,
        progress=progress.append,
    )
    total = sum(w.nbytes for w in checkpoints.leaves(tensors, config).values())
    assert sum(reads.values()) == sum(progress) == total


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4)], ids=str)
def test_dtypes_are_cast_on_the_way(folder, config, tensors, dtype, shape):
    loaded = load_weights(
        folder, config, sharding_of=sharding_on(shape), dtype=dtype, layout="stacked"
    )
    for leaf, w in checkpoints.leaves(tensors, config).items():
        assert checkpoints.same_bits(loaded[leaf], w.astype(checkpoints.DTYPES[dtype])), leaf


def flip(path, position=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 2, 4)], ids=str)
@pytest.mark.parametrize(
    ("chunk", "name"),
    [
        (Chunk("layers.1.moe.experts.up", 5), r"layers\.1\.moe\.experts\.up\[5\]"),
        (Chunk("layers.0.attention.o_proj", None), r"layers\.0\.attention\.o_proj"),
        (Chunk("norm.weight", None), r"norm\.weight"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_flipped_bit_is_refused_naming_the_tensor(tmp_path, config, original, chunk, name, shape):
    convert(original, tmp_path / "out")
    ndim = {"up": 3, "o_proj": 2, "weight": 1}[chunk.leaf.split(".")[-1]]
    flip(chunk_path(tmp_path / "out", chunk, ndim), 17)
    arguments = {"sharding_of": sharding_on(shape), "expert_shards": shape[1]}
    with pytest.raises(MixtralError, match=f"^{name}: its bytes are not those") as caught:
        load_weights(tmp_path / "out", config, **arguments)
    assert caught.value.code == BAD_DATA
    # The negative control: nothing else notices.
    load_weights(tmp_path / "out", config, verify=False, **arguments)


def test_a_flipped_bit_of_the_manifest_is_refused(tmp_path, config, original):
    convert(original, tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    text = path.read_text()
    at = text.index('"chunks"') + 20
    path.write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    with pytest.raises(MixtralError, match="own digest") as caught:
        load_weights(tmp_path / "out", config, sharding_of=one_device)
    assert caught.value.code == BAD_DATA


def test_missing_and_truncated_chunks_are_all_listed(tmp_path, config, original):
    convert(original, tmp_path / "out")
    lost = chunk_path(tmp_path / "out", Chunk("layers.0.moe.experts.gate", 2), 3)
    short = chunk_path(tmp_path / "out", Chunk("lm_head", None), 2)
    lost.unlink()
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(MixtralError) as caught:
        load_weights(tmp_path / "out", config, sharding_of=one_device)
    assert caught.value.code == BAD_DATA
    assert "layers.0.moe.experts.gate: 2.0.0: expected 4096 bytes, got no file" in str(caught.value)
    assert "lm_head: 0.0: expected 4096 bytes, got 4095 bytes" in str(caught.value)


def test_configuration_of_another_size_is_refused(folder, small_config):
    with pytest.raises(MixtralError) as caught:
        load_weights(
            folder,
            small_config(num_hidden_layers=3, vocab_size=65, dtype="bfloat16"),
            sharding_of=one_device,
        )
    assert caught.value.code == BAD_DATA
    assert "missing" in str(caught.value)
    assert "65" in str(caught.value)


def test_expert_shards_must_divide_the_experts(folder, config):
    with pytest.raises(ValueError, match="3 expert shards"):
        load_weights(folder, config, sharding_of=one_device, expert_shards=3)


def test_folders_are_told_by_their_files(tmp_path, original, converted, config):
    assert is_checkpoint(original) == "published"
    assert is_checkpoint(converted) == "orbax"
    assert is_checkpoint(tmp_path) is None
    assert is_checkpoint(tmp_path / "nowhere") is None
    with pytest.raises(MixtralError) as caught:
        load_weights(tmp_path, config, sharding_of=one_device)
    assert caught.value.code == INPUT_NOT_FOUND
    assert config_to_dict(config)["torch_dtype"] == "bfloat16"
