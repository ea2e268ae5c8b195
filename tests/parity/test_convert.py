"""Our leaves are transformers' own weights, bit for bit, whichever way it saved them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from mixtral_jax.config import read_config
from mixtral_jax.convert import ConvertOptions, convert, load_weights

pytestmark = pytest.mark.parity


def bits(torch: Any, tensor: Any) -> np.ndarray:
    """The raw bytes of a tensor of any dtype, with its shape."""
    width = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[tensor.dtype]
    return tensor.detach().contiguous().view(width).numpy()


def expected(torch: Any, model: Any) -> dict[str, np.ndarray]:
    """Canonical leaves of a model in memory, read from its modules and not by their names."""
    found = {
        "embed_tokens": model.model.embed_tokens.weight,
        "norm.weight": model.model.norm.weight,
        "lm_head": model.lm_head.weight,
    }
    for i, layer in enumerate(model.model.layers):
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        found |= {
            f"layers.{i}.attention_norm.weight": layer.input_layernorm.weight,
            f"layers.{i}.moe_norm.weight": layer.post_attention_layernorm.weight,
            f"layers.{i}.attention.q_proj": layer.self_attn.q_proj.weight,
            f"layers.{i}.attention.k_proj": layer.self_attn.k_proj.weight,
            f"layers.{i}.attention.v_proj": layer.self_attn.v_proj.weight,
            f"layers.{i}.attention.o_proj": layer.self_attn.o_proj.weight,
            f"layers.{i}.moe.router.weight": layer.mlp.gate.weight,
            f"layers.{i}.moe.experts.gate": gate,
            f"layers.{i}.moe.experts.up": up,
            f"layers.{i}.moe.experts.down": layer.mlp.experts.down_proj,
        }
    return {leaf: bits(torch, tensor) for leaf, tensor in found.items()}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request, torch, transformers):
    config = transformers.MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).to(getattr(torch, request.param)).eval()
    with torch.no_grad():
        for weight in model.parameters():  # norms start as ones: make every weight telling
            weight.copy_(torch.randn_like(weight))
    return model


@pytest.mark.parametrize("original_format", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_every_saved_form_gives_the_weights_of_the_model(
    tmp_path, torch, model, original_format, shard_size
):
    source = tmp_path / "hf"
    model.save_pretrained(source, save_original_format=original_format, max_shard_size=shard_size)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    convert(source, tmp_path / "out")
    sharding = SingleDeviceSharding(jax.devices()[0])
    wanted = expected(torch, model)
    for folder in (source, tmp_path / "out"):
        loaded = load_weights(
            folder, read_config(folder), sharding_of=lambda path: sharding, layout="stacked"
        )
        assert loaded.keys() == wanted.keys()
        for leaf, bytes_ in wanted.items():
            found = np.asarray(loaded[leaf])
            assert found.shape == bytes_.shape, leaf
            assert found.tobytes() == bytes_.tobytes(), leaf


def test_every_saved_form_has_one_digest(tmp_path, model):
    digests = set()
    for original_format in (True, False):
        source = tmp_path / f"hf-{original_format}"
        model.save_pretrained(source, save_original_format=original_format)
        digests.add(convert(source, tmp_path / f"out-{original_format}").digest)
    assert len(digests) == 1


@pytest.mark.parametrize(("weights", "num_files"), [(10**6, 1), (175_000, 2), (21_250, 19)])
def test_transformers_loads_what_we_export(
    tmp_path, torch, transformers, model, weights, num_files
):
    """By way of our own format, in as many shards as 8x7B has, too."""
    shard_size = str(weights * model.dtype.itemsize)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    options = ConvertOptions(format="safetensors", max_shard_size=shard_size)
    convert(tmp_path / "ours", tmp_path / "out", options)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == num_files
    again, told = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(told.values()), told
    assert again.dtype == model.dtype
    wanted, found = model.state_dict(), again.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.array_equal(bits(torch, found[name]), bits(torch, tensor)), name
