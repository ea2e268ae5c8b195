"""The table of names reads both ways, and every tensor and leaf is accounted for exactly once."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from mixtral_jax.config import PRESETS
from mixtral_jax.convert import convert
from mixtral_jax.convert.names import pieces, plan
from mixtral_jax.convert.safetensors_file import Tensor
from mixtral_jax.errors import BAD_DATA, MOST_LISTED, MixtralError, listing
from mixtral_jax.model.transformer import leaf_specs
from tests.convert import checkpoints

W1 = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
NORM = "model.norm.weight"
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXTRA = "model.layers.0.self_attn.q_proj.bias"


@pytest.mark.parametrize(
    ("preset", "num_tensors"), [("mixtral-8x7b", 995), ("mixtral-8x22b", 1739)]
)
def test_published_models_have_the_published_number_of_tensors(preset, num_tensors):
    config = dataclasses.replace(PRESETS[preset])
    names = [piece.rows.tensor for piece in pieces("original", leaf_specs(config))]
    assert len(names) == len(set(names)) == num_tensors


def test_table_names_the_tensors_of_an_independent_writer(config, tensors):
    for layout, written in (("original", tensors), ("fused", checkpoints.fused(tensors, config))):
        named = {p.rows.tensor: p.tensor_shape for p in pieces(layout, leaf_specs(config))}
        assert named == {name: w.shape for name, w in written.items()}


@pytest.mark.slow
def test_half_a_million_names_are_refused_at_once(config, tensors):
    """No real model has so many; all of a real one's problems are listed."""
    crafted = {
        f"model.layers.{i}.mlp.x": Tensor(
            name="x", file="f", dtype="F32", shape=(), start=0, stop=0
        )
        for i in range(500_000)
    }
    started = time.perf_counter()
    with pytest.raises(MixtralError, match=r"; and \d{6} more; fix: "):
        plan(crafted, leaf_specs(config), source="crafted")
    assert time.perf_counter() - started < 2


def test_a_config_that_asks_for_millions_of_tensors_is_refused_by_their_number(config, tensors):
    large = dataclasses.replace(config, num_local_experts=1024, num_hidden_layers=32)
    found = {
        name: Tensor(name=name, file="f", dtype="BF16", shape=w.shape, start=0, stop=w.nbytes)
        for name, w in tensors.items()
    }
    with pytest.raises(MixtralError, match=rf"describes 98531 tensors.*have {len(found)}; fix: "):
        plan(found, leaf_specs(large), source="small")


def test_beyond_some_hundreds_problems_are_counted():
    lines = [f"missing {k:04}" for k in range(MOST_LISTED + 7)]
    assert listing(lines[:-7]) == "; ".join(lines[:-7])
    assert listing(reversed(lines)) == "; ".join([*lines[:-7], "and 7 more"])


def problems(tmp_path, config, changed) -> str:
    folder = checkpoints.write(tmp_path / "planted", config, changed)
    with pytest.raises(MixtralError) as caught:
        convert(folder, tmp_path / "out")
    assert caught.value.code == BAD_DATA
    assert [path.name for path in tmp_path.iterdir()] == ["planted"]
    return str(caught.value)


def test_all_problems_are_listed_at_once(tmp_path, config, tensors):
    changed = {name: w for name, w in tensors.items() if name not in (W1, ROUTER)}
    changed[NORM] = np.ones(3, tensors[NORM].dtype)
    changed[W2] = tensors[W2].astype(np.int32)
    changed[EXTRA] = np.ones(3, np.float32)
    line = problems(tmp_path, config, changed)
    assert f"missing {W1}" in line
    assert f"missing {ROUTER}" in line
    assert f"extra {EXTRA}" in line
    assert f"{NORM}: expected shape [32], got [3]" in line
    assert f"{W2}: expected dtype F32 or F16 or BF16, got I32" in line
    # The wrong dtype also makes the stack of its experts mixed.
    assert "6 problem(s)" in line


@pytest.mark.parametrize("name", [W1, W2, NORM, ROUTER, "lm_head.weight"])
def test_one_missing_tensor_is_named(tmp_path, config, tensors, name):
    line = problems(tmp_path, config, {n: w for n, w in tensors.items() if n != name})
    assert "1 problem(s)" in line
    assert f"missing {name}" in line


def test_transposed_experts_are_refused(tmp_path, config, tensors):
    line = problems(tmp_path, config, tensors | {W2: np.ascontiguousarray(tensors[W2].T)})
    assert f"{W2}: expected shape [32, 64], got [64, 32]" in line


def test_experts_of_two_dtypes_are_refused(tmp_path, config, tensors):
    line = problems(tmp_path, config, tensors | {W1: tensors[W1].astype(np.float32)})
    assert "layers.0.moe.experts.gate: expected one dtype for all experts, got BF16 and F32" in line


def test_both_layouts_at_once_are_refused(tmp_path, config, tensors):
    line = problems(tmp_path, config, checkpoints.fused(tensors, config) | {W1: tensors[W1]})
    assert f"extra {W1}" in line


def test_more_layers_than_configured_are_refused(tmp_path, small_config, tensors):
    line = problems(tmp_path, small_config(num_hidden_layers=1, dtype="bfloat16"), tensors)
    assert f"extra {W2}" in line


def test_tensor_in_two_files_and_tensor_missing_from_its_file_are_listed(tmp_path, config, tensors):
    folder = checkpoints.write(tmp_path / "planted", config, tensors, num_files=2)
    shards = sorted(folder.glob("*.safetensors"))
    order = list(tensors)
    first = {name: tensors[name] for name in order[::2]}
    moved, doubled = order[0], order[1]
    del first[moved]
    checkpoints.save_file(first | {doubled: tensors[doubled]}, shards[0])
    with pytest.raises(MixtralError) as caught:
        convert(folder, tmp_path / "out")
    line = str(caught.value)
    assert f"{doubled} in {shards[0].name} is not listed there by the index" in line
    assert f"{moved} is listed by the index but not in {shards[0].name}" in line
    assert caught.value.code == BAD_DATA


def test_buffers_of_old_checkpoints_are_ignored_with_a_note(tmp_path, config, tensors, converted):
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, "f4") for i in (0, 1)}
    folder = checkpoints.write(tmp_path / "old", config, tensors | buffers)
    notes = []
    report = convert(folder, tmp_path / "out", note=notes.append)
    assert any("2 rotary_emb.inv_freq buffers are ignored" in note for note in notes)
    assert report.digest == convert(folder, tmp_path / "out").digest


@pytest.fixture
def tied(small_config):
    config = small_config(tie_word_embeddings=True)
    return config, checkpoints.random_tensors(config)


def test_tied_head_is_accepted_when_equal_or_absent(tmp_path, tied):
    config, tensors = tied
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    without = convert(checkpoints.write(tmp_path / "a", config, tensors), tmp_path / "a2")
    equal = convert(checkpoints.write(tmp_path / "b", config, tensors | head), tmp_path / "b2")
    assert without.digest == equal.digest
    assert without.tensors == equal.tensors == len(leaf_specs(config))


@pytest.mark.parametrize("kind", ["value", "dtype"])
def test_tied_head_that_differs_is_refused(tmp_path, tied, kind):
    config, tensors = tied
    head = tensors["model.embed_tokens.weight"].copy()
    if kind == "value":
        head[-1, -1] += 1
    else:
        head = head.astype(np.float16)
    line = problems(tmp_path, config, tensors | {"lm_head.weight": head})
    assert "lm_head.weight differs from model.embed_tokens.weight" in line
