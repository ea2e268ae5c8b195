"""Whole quantized checkpoints: their leaves in parts or plain, and every fault told in one line."""

from __future__ import annotations

import numpy as np
import pytest

from mixtral_jax.config import read_config
from mixtral_jax.convert.dequantized import DequantizedLeaves
from mixtral_jax.convert.leaves import open_leaves
from mixtral_jax.convert.names import Chunk, chunks_of
from mixtral_jax.convert.parts import join, split_path
from mixtral_jax.convert.quantized.dense import dequantize
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, MixtralError
from mixtral_jax.model.transformer import leaf_specs
from tests.convert import checkpoints
from tests.convert.quantized import packers, published
from tests.convert.quantized.published import CASES, publish

W1 = "model.layers.1.block_sparse_moe.experts.3.w1"
Q = "model.layers.0.self_attn.q_proj"


def opened(folder):
    notes: list[str] = []
    config = read_config(folder, note=notes.append)
    leaves = open_leaves(folder, leaf_specs(config), head_dim=config.head_dim, note=notes.append)
    return leaves, config, notes


def read(leaves, chunk: Chunk) -> np.ndarray:
    shape = leaves.specs[chunk.leaf].shape[0 if chunk.expert is None else 1 :]
    out = np.empty(shape, leaves.dtype(chunk.leaf))
    leaves.read_rows(chunk, 0, shape[0], out)
    return out


def values(leaves, weight: str, shape: tuple[int, ...]) -> np.ndarray:
    """A leaf in f32, whatever it is stored as."""
    out = np.empty(shape, np.float32)
    parts = [part for part in map(split_path, leaves.specs) if part and part.weight == weight]
    for chunk in chunks_of(weight, shape):
        into = out if chunk.expert is None else out[chunk.expert]
        if not parts:
            into[...] = read(leaves, chunk)
            continue
        found = {p.part: read(leaves, Chunk(str(p), chunk.expert)) for p in parts}
        dequantize(join(parts[0].scheme, found, np.float32), into)
    return out


@pytest.mark.parametrize("name", CASES)
def test_every_leaf_stands_for_the_weights_that_were_packed(tmp_path, name):
    case = CASES[name]
    made = publish(case)
    leaves, config, notes = opened(made.write(tmp_path / "src"))
    expected = checkpoints.leaves(made.weights, config)
    quantized = {part.weight for part in map(split_path, leaves.specs) if part}
    assert len(quantized) == 2 * 7 + case.has_head
    assert ("lm_head" in quantized) == case.has_head
    for leaf, w in expected.items():
        found = values(leaves, leaf, w.shape)
        if leaf.endswith("router.weight"):  # decoded, and rounded to the dtype of the weights
            dtype = published.DTYPES[case.dtype]
            assert np.array_equal(found.astype(dtype), w.astype(dtype)), leaf
        else:
            assert np.array_equal(found, w), leaf
    leaves.close()
    assert [note for note in notes if "sliding_window" not in note] == []
    assert config.sliding_window is None


@pytest.mark.parametrize("name", ["gptq3 128 order v2", "nf4 nested router", "fp8 tensor"])
def test_leaves_are_dequantized_where_that_is_asked(tmp_path, name):
    made = publish(CASES[name])
    packed, config, _ = opened(made.write(tmp_path / "src"))
    leaves = DequantizedLeaves(packed, leaf_specs(config), np.dtype(np.float32))
    assert leaves.specs.keys() == leaf_specs(config).keys()
    for leaf, exact in checkpoints.leaves(made.weights, config).items():
        w = exact
        if leaf.endswith("router.weight"):
            w = exact.astype(published.DTYPES[CASES[name].dtype]).astype(np.float32)
        assert np.array_equal(values(leaves, leaf, w.shape), w), leaf
    leaves.close()


def refusal(folder) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        opened(folder)[0].close()
    assert "\n" not in str(caught.value)
    return caught.value


def planted(tmp_path, name, **changes):
    """A checkpoint with some tensors exchanged (None: left out) or added, and its error."""
    made = publish(CASES[name])
    tensors = made.tensors | {key: change(made) for key, change in changes.items()}
    tensors = {key: w for key, w in tensors.items() if w is not None}
    return refusal(made._replace(tensors=tensors).write(tmp_path / "src"))


FAULTS = [
    ({f"{W1}.scales": lambda m: None}, f"1 problem.*{W1}.weight \\(GPTQ\\): missing scales"),
    (
        {f"{W1}.{p}": lambda m: None for p in ("qweight", "qzeros", "scales", "g_idx")},
        f"1 problem.*missing {W1}.weight",
    ),
    (
        {f"{Q}.qweight": lambda m: np.zeros((3, 128), np.int32)},
        r"qweight: expected shape \[16, 128\], got \[3, 128\]",
    ),
    (
        {f"{Q}.qweight": lambda m: m.tensors[f"{Q}.qweight"].astype(np.float32)},
        "qweight: expected dtype I32, got F32",
    ),
    (
        {"model.layers.7.self_attn.q_proj.qweight": lambda m: np.zeros((2, 2), np.int32)},
        "1 problem.*extra model.layers.7.self_attn.q_proj.weight",
    ),
    (
        {"model.norm.qweight": lambda m: np.zeros((2, 2), np.int32)},
        "model.norm.weight: quantized, which is not read there",
    ),
    (
        {f"{Q}.SCB": lambda m: np.zeros(2, np.float32)},
        f"{Q}.SCB: expected GPTQ weights, as config.json has it, got a bitsandbytes 8-bit",
    ),
    ({f"{W1}.weight": lambda m: np.zeros((256, 128), np.float16)}, f"extra {W1}.weight"),
    (
        {f"{Q}.g_idx": lambda m: m.tensors[f"{Q}.g_idx"] + 1},
        f"{Q}.weight \\(GPTQ\\): g_idx: expected 4 groups of 32",
    ),
]


@pytest.mark.parametrize(("changes", "words"), FAULTS, ids=[words[:40] for _, words in FAULTS])
def test_faults_are_told_in_one_line(tmp_path, changes, words):
    made = publish(published.gptq_case(4, 32, order=True))
    tensors = made.tensors | {key: change(made) for key, change in changes.items()}
    tensors = {key: w for key, w in tensors.items() if w is not None}
    error = refusal(made._replace(tensors=tensors).write(tmp_path / "src"))
    assert error.code == BAD_DATA
    with pytest.raises(MixtralError, match=words):
        raise error


def test_all_faults_are_listed_at_once(tmp_path):
    made = publish(CASES["nf4"])
    tensors = dict(made.tensors)
    del tensors[f"{W1}.weight.absmax"], tensors["model.norm.weight"]
    tensors[f"{Q}.weight.quant_map"] = np.zeros(15, np.float32)
    line = str(refusal(made._replace(tensors=tensors).write(tmp_path / "src")))
    assert "3 problem(s)" in line
    for words in ("missing absmax", "missing model.norm.weight", "quant_map: expected shape [16]"):
        assert words in line


def test_a_truncated_file_is_refused(tmp_path):
    folder = publish(CASES["awq"]).write(tmp_path / "src")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(folder).code == BAD_DATA


def test_one_plain_expert_among_quantized_ones_is_refused(tmp_path):
    made = publish(CASES["gptq4 128"])
    tensors = {name: w for name, w in made.tensors.items() if not name.startswith(f"{W1}.")}
    tensors[f"{W1}.weight"] = made.weights[f"{W1}.weight"].astype(np.float16)
    line = str(refusal(made._replace(tensors=tensors).write(tmp_path / "src")))
    assert "expected one dtype for all experts, got F16 and quantized" in line


def test_experts_of_two_schemes_are_refused(tmp_path):
    made, other = publish(CASES["nf4"]), publish(CASES["fp4 in bf16"])
    tensors = {name: w for name, w in made.tensors.items() if not name.startswith(f"{W1}.")}
    tensors |= {name: w for name, w in other.tensors.items() if name.startswith(f"{W1}.")}
    line = str(refusal(made._replace(tensors=tensors).write(tmp_path / "src")))
    assert "layers.1.moe.experts.gate: its experts are quantized in different ways" in line


def test_large_weights_that_stayed_plain_are_noted(tmp_path):
    made = publish(CASES["nf4"])
    experts = [name for name in made.quantized if ".experts." in name]
    tensors = {k: w for k, w in made.tensors.items() if ".experts." not in k}
    tensors |= {name: made.weights[name].astype(published.DTYPES["bfloat16"]) for name in experts}
    leaves, _, notes = opened(made._replace(tensors=tensors).write(tmp_path / "src"))
    leaves.close()
    assert any("6 of 14 leaves of attention and experts are not quantized" in n for n in notes)


def test_a_config_that_speaks_of_quantization_without_any_is_refused(tmp_path):
    made = publish(CASES["nf4"])
    plain = {name: w.astype(published.DTYPES["bfloat16"]) for name, w in made.weights.items()}
    error = refusal(made._replace(tensors=plain).write(tmp_path / "src"))
    assert (error.code, "no tensor is quantized" in str(error)) == (BAD_DATA, True)


def test_quantized_tensors_without_a_word_of_it_in_the_config_are_refused(tmp_path):
    made = publish(CASES["awq"])
    config = {k: v for k, v in made.config.items() if k != "quantization_config"}
    error = refusal(made._replace(config=config).write(tmp_path / "src"))
    assert "expected weights in f32, bf16 or f16, as config.json has it" in str(error)


def test_symmetry_that_the_zero_points_deny_is_refused_while_reading(tmp_path):
    """A v2 checkpoint whose configuration lost that word: each zero point would be one too high."""
    made = publish(published.gptq_case(v2=True))
    quantization = {
        k: v for k, v in made.config["quantization_config"].items() if k != "checkpoint_format"
    }
    config = {**made.config, "quantization_config": quantization}
    leaves, _, _ = opened(made._replace(config=config).write(tmp_path / "src"))
    with pytest.raises(MixtralError, match=r"qzeros: expected 8 everywhere.*got 9"):
        read(leaves, Chunk("layers.0.attention.q_proj.gptq4.scales", None))
    leaves.close()


def test_the_file_beside_the_config_is_read(tmp_path):
    made = publish(CASES["gptq3 128 order v2"])
    quantization = made.config["quantization_config"]
    config = {k: v for k, v in made.config.items() if k != "quantization_config"}
    beside = {k: v for k, v in quantization.items() if k != "quant_method"}
    folder = made._replace(config=config).write(tmp_path / "old", quantize_config=beside)
    leaves, _, _ = opened(folder)
    assert "layers.0.moe.experts.down.gptq3.order" in leaves.specs
    leaves.close()
    both = made.write(tmp_path / "both", quantize_config=beside)
    opened(both)[0].close()
    other = made.write(tmp_path / "other", quantize_config={**beside, "bits": 4})
    error = refusal(other)
    assert (error.code, "bits is 3, but 4 in" in str(error)) == (BAD_CONFIG, True)


def test_scales_of_an_eight_bit_cache_are_ignored_and_noted(tmp_path):
    made = publish(CASES["fp8 channel"])
    more = {
        f"model.layers.{i}.self_attn.{k}_scale": np.ones(1, np.float32)
        for i in (0, 1)
        for k in "kv"
    }
    folder = made._replace(tensors=made.tensors | more).write(tmp_path / "src")
    leaves, _, notes = opened(folder)
    leaves.close()
    assert any("4 scales of the cache are ignored" in note for note in notes)


def test_packers_are_seen_to_matter():
    """The negative control: one code changed is another matrix."""
    one, other = (packers.gptq()(np.random.default_rng(s), 64, 128).matrix for s in (1, 2))
    assert not np.array_equal(one, other)
