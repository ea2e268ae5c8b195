"""Published quantized checkpoints as models: packed on the devices, converted, dequantized."""

from __future__ import annotations

import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import mixtral_jax as mj
from mixtral_jax.config import read_config
from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.qtensor import Nested
from mixtral_jax.weights import QTensor
from tests.convert import checkpoints
from tests.convert import test_adapter as adapters
from tests.convert.quantized import published
from tests.convert.quantized.published import CASES, publish
from tests.reference import mixtral as reference
from tests.slow import mostly_slow

TOKENS = np.arange(24).reshape(2, 12) * 7 % 64
F32 = 2e-3  # products in f32 in another order than numpy's


def assert_close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=F32, atol=F32)


# Each kind of codes and every oddity of a layout once.
KEPT = ("gptq4 32 order unfused", "gptq2 64 v2 asym", "awq", "fp8 channel", "nf4 nested router")


@pytest.fixture(scope="module", params=mostly_slow(CASES, KEPT))
def folder(request, tmp_path_factory):
    made = publish(CASES[request.param])
    return made, made.write(tmp_path_factory.mktemp("quantized") / "src")


def expected_logits(made) -> np.ndarray:
    config = {**made.config, "sliding_window": None}
    weights = dict(made.weights)
    gates = [name for name in made.quantized if published.GATE.fullmatch(name)]
    for name in gates:  # the router is decoded to the dtype of the weights
        dtype = published.DTYPES[made.config["torch_dtype"]]
        weights[name] = weights[name].astype(dtype).astype(np.float32)
    return reference.logits(weights, config, TOKENS)


def kinds(lm) -> dict[str, int]:
    is_kind = lambda w: isinstance(w, QTensor)  # noqa: E731
    leaves = jax.tree.leaves(nnx.state(lm.model), is_leaf=is_kind)
    return {"packed": sum(map(is_kind, leaves)), "all": len(leaves)}


def test_the_loaded_model_is_packed_and_has_the_logits_of_the_plain_weights(folder):
    made, path = folder
    lm = mj.load(path, mesh="1x1", dtype="float32")
    large = 2 * (4 + 3) + ("lm_head.weight" in made.quantized)  # experts are stacked
    assert kinds(lm)["packed"] == large
    assert_close(lm.logits(TOKENS), expected_logits(made))


ON_MESHES = ["gptq4 32 order unfused", "gptq3 32 asym", "awq", "nf4 nested router", "fp8 channel"]


@pytest.mark.parametrize(
    "case",
    mostly_slow(
        itertools.product(ON_MESHES, ("1x8", "2x4", "1x4x2")),
        [("gptq4 32 order unfused", "1x4x2"), ("nf4 nested router", "2x4"), ("awq", "1x8")],
    ),
    ids=" on ".join,
)
def test_every_mesh_has_the_same_logits(tmp_path, case):
    name, mesh = case
    made = publish(CASES[name], intermediate_size=512)
    lm = mj.load(made.write(tmp_path / "src"), mesh=mesh, dtype="float32")
    assert_close(lm.logits(TOKENS), expected_logits(made))


def test_an_adapter_on_activation_order_is_the_same_on_a_tensor_axis(tmp_path):
    """The order of the hidden channels moves at load; the factors must go with it."""
    made = publish(CASES["gptq4 32 order unfused"])
    src = made.write(tmp_path / "src")
    modules = [
        f"model.layers.{i}.block_sparse_moe.experts.{e}.{name}"
        for i, e, name in itertools.product(range(2), range(8), ("w1", "w2", "w3"))
    ]
    factors = adapters.pairs(made.weights, *modules)
    adapter = adapters.write(tmp_path / "adapter", factors)
    want = made._replace(weights=adapters.merged(made.weights, factors))
    lines: list[str] = []
    lm = mj.load(src, mesh="1x2x2", dtype="float32", adapter=str(adapter), note=lines.append)
    assert_close(lm.logits(TOKENS), expected_logits(want))
    assert np.abs(expected_logits(want) - expected_logits(made)).max() > 100 * F32
    mj.load(src, mesh="1x2x2", dtype="float32", note=(plain := []).append)
    total = [line for line in plain if line.startswith("total")]
    assert total == [line for line in lines if line.startswith("total")]  # of the base alone


def test_sixteen_bits_are_within_their_rounding(tmp_path):
    made = publish(CASES["nf4"])
    lm = mj.load(made.write(tmp_path / "src"), mesh="1x1")
    plain = dict(made.weights)
    dtype = published.DTYPES["bfloat16"]
    folder = published.Published(
        {name: w.astype(dtype) for name, w in plain.items()},
        {k: v for k, v in made.config.items() if k != "quantization_config"},
        plain,
        frozenset(),
    ).write(tmp_path / "plain")
    reference_lm = mj.load(folder, mesh="1x1")
    assert np.array_equal(lm.logits(TOKENS), reference_lm.logits(TOKENS))


def test_converted_it_is_the_same_model(folder, tmp_path):
    made, path = folder
    notes: list[str] = []
    report = convert(path, tmp_path / "ours", note=notes.append)
    assert report.parameters == sum(w.size for w in made.weights.values())
    assert "quantization_config" not in json.loads((tmp_path / "ours/config.json").read_text())
    one, other = (mj.load(p, mesh="1x1", dtype="float32") for p in (path, tmp_path / "ours"))
    assert kinds(one) == kinds(other)
    state, same = jax.tree.flatten(nnx.state(one.model)), jax.tree.flatten(nnx.state(other.model))
    assert state[1] == same[1]
    assert all(map(checkpoints.same_bits, state[0], same[0]))
    assert convert(path, tmp_path / "ours").digest == report.digest  # done already


def test_dequantized_it_is_a_plain_checkpoint(folder, tmp_path):
    made, path = folder
    options = ConvertOptions(format="safetensors", dequantize=True, dtype="float32")
    convert(path, tmp_path / "plain", options)
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert ("quantization_config" in config, config["torch_dtype"]) == (False, "float32")
    found = load_file(tmp_path / "plain/model.safetensors")
    assert found.keys() == made.weights.keys()
    for name, w in made.weights.items():
        if published.GATE.fullmatch(name) and name in made.quantized:
            dtype = published.DTYPES[made.config["torch_dtype"]]
            assert np.array_equal(found[name], w.astype(dtype).astype(np.float32)), name
        else:
            assert np.array_equal(found[name], w), name


def test_our_own_folder_is_dequantized_as_its_source_is(tmp_path):
    path = publish(CASES["gptq4 32 order unfused"]).write(tmp_path / "src")
    convert(path, tmp_path / "ours")
    options = ConvertOptions(dequantize=True)
    digests = [
        convert(p, tmp_path / f"{p.name}.plain", options).digest for p in (path, tmp_path / "ours")
    ]
    assert digests[0] == digests[1]
    assert {r.dtype for r in read_manifest(tmp_path / "ours.plain").leaves.values()} == {"float16"}
    part = "layers.1.moe.experts.down.gptq4.codes"
    chunk = next((tmp_path / f"ours/weights/{part}").rglob("3.0.0"))
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(bytes(content))
    with pytest.raises(MixtralError, match="its bytes are not those") as caught:
        convert(tmp_path / "ours", tmp_path / "damaged", options)
    assert caught.value.code == BAD_DATA


def test_what_is_not_quantized_cannot_be_dequantized(tmp_path, original):
    with pytest.raises(MixtralError, match="not quantized; fix: leave it out") as caught:
        convert(original, tmp_path / "out", ConvertOptions(dequantize=True))
    assert caught.value.code == BAD_DATA
    assert not (tmp_path / "out").exists()


def test_quantized_weights_are_exported_only_as_plain_ones(tmp_path):
    path = publish(CASES["int8"]).write(tmp_path / "src")
    with pytest.raises(MixtralError, match="or add --dequantize"):
        convert(path, tmp_path / "out", ConvertOptions(format="safetensors"))


def test_another_quantization_config_is_another_conversion(tmp_path):
    made = publish(published.gptq_case(4, 128, sym=False))
    quantization = made.config["quantization_config"]
    folder = made.write(tmp_path / "src")
    convert(folder, tmp_path / "out")
    config = made.config | {"quantization_config": quantization | {"checkpoint_format": "gptq_v2"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MixtralError, match="holds another conversion"):
        convert(folder, tmp_path / "out")


def test_nan_scales_are_refused(tmp_path):
    made = publish(CASES["awq"])
    name = "model.layers.0.block_sparse_moe.experts.5.w2.scales"
    scales = made.tensors[name].copy()
    scales[0, 3] = np.nan
    folder = made._replace(tensors=made.tensors | {name: scales}).write(tmp_path / "src")
    with pytest.raises(MixtralError, match=r"experts\.5\.w2\.weight has NaN or infinite values"):
        convert(folder, tmp_path / "out")


def test_nested_scales_stay_nested_where_no_axis_splits_a_matrix(tmp_path):
    made = publish(CASES["nf4 nested router"])
    lm = mj.load(made.write(tmp_path / "src"), mesh="1x8", dtype="float32")
    q = lm.model.layers[0].attention.q_proj[...]
    assert isinstance(q.scales, Nested)


def test_the_window_that_these_repositories_publish_is_not_followed(tmp_path):
    made = publish(CASES["gptq4 128"])
    notes: list[str] = []
    assert made.config["sliding_window"] == 4096
    assert read_config(made.write(tmp_path / "src"), note=notes.append).sliding_window is None
    assert any("known publishing mistake" in note for note in notes)
