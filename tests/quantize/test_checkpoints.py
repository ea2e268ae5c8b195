"""A checkpoint in few bits, through the command and back: the same tokens on every mesh."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import mixtral_jax as mj
from mixtral_jax.config import read_config
from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.load import THREADS
from mixtral_jax.convert.manifest import LeafRecord, read_manifest
from mixtral_jax.convert.orbax import read_leaf, write_leaf
from mixtral_jax.convert.orbax_leaves import WEIGHTS
from mixtral_jax.convert.output import OrbaxOutput
from mixtral_jax.convert.transfer import sha256
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, INTERRUPTED, OUTPUT_EXISTS, MixtralError
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.plan.schemes import weight_bytes
from mixtral_jax.qtensor import QTensor
from mixtral_jax.quantize.driver import quantize_checkpoint
from mixtral_jax.quantize.makers import Recipe
from mixtral_jax.quantize.makers import quantize as quantize_matrix
from mixtral_jax.quantize.source import QuantizingLeaves, is_quantized
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.weights import ExpertSlots
from tests.convert import checkpoints
from tests.models import bytes_held
from tests.slow import mostly_slow

RECIPES = {
    "int8": Recipe(scheme="int8"),
    "fp8": Recipe(scheme="fp8"),
    "int4": Recipe(scheme="int4"),
    "int4 asymmetric": Recipe(scheme="int4", group_size=32, symmetric=False),
    "nf4": Recipe(scheme="nf4"),
    "nf4 nested": Recipe(scheme="nf4", double_quant=True),
    "fp4": Recipe(scheme="fp4"),
}
MESHES = ["1x1", "1x8", "2x4"]
PROMPTS = [[1, 7, 300, 41], [1, 90, 12, 5, 1200, 33, 8, 2, 77]]


def folder_of(tmp_path: Path, name: str) -> Path:
    return tmp_path / name.replace(" ", "-")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder and report of the embedded model in every recipe, made once each."""
    folder, found = tmp_path_factory.mktemp("made"), {}

    def make(name: str):
        if name not in found:
            dst = folder_of(folder, name)
            found[name] = dst, quantize_checkpoint(EMBEDDED_FOLDER, dst, RECIPES[name])
        return found[name]

    return make


@pytest.fixture
def small(tmp_path, small_config) -> Path:
    config = small_config(
        hidden_size=64, head_dim=16, num_hidden_layers=1, num_local_experts=2, dtype="bfloat16"
    )
    return checkpoints.write(tmp_path / "hf", config, checkpoints.random_tensors(config))


def leaves_of(lm) -> dict:
    flat = nnx.to_flat_state(nnx.state(lm.model))
    return {".".join(map(str, path)): param.get_value() for path, param in flat}


def canonical(w) -> list[np.ndarray]:
    """The parts of a weight, experts in their order."""
    if isinstance(w, ExpertSlots):
        slots = [jax.tree.leaves(slot) for slot in w.slots]
        columns = zip(*slots, strict=True)
        stacks = [np.stack([np.asarray(part) for part in column], 1) for column in columns]
        return [stack.reshape(-1, *stack.shape[2:]) for stack in stacks]
    return [np.asarray(part) for part in jax.tree.leaves(w)]


def tokens(lm) -> list:
    found = lm.generate(prompt_token_ids=PROMPTS, max_new_tokens=8, temperature=0, ignore_eos=True)
    return [completion.token_ids for completion in found]


@pytest.mark.parametrize("model", mostly_slow(["small", "embedded"], []))
@pytest.mark.parametrize("name", mostly_slow(RECIPES, ["nf4 nested"]))
def test_tokens_are_the_same_on_every_mesh(tmp_path, small_config, made, name, model):
    if model == "embedded":
        folder, _ = made(name)
    else:
        folder, config = (
            tmp_path / "q",
            small_config(hidden_size=128, head_dim=32, num_hidden_layers=1, vocab_size=2048),
        )
        src = checkpoints.write(tmp_path / "hf", config, checkpoints.random_tensors(config))
        quantize_checkpoint(src, folder, RECIPES[name])
    rows = [tokens(mj.load(folder, mesh=text, dtype="float32")) for text in MESHES]
    assert rows[0] == rows[1] == rows[2]
    assert len(rows[0][0]) == 8


@pytest.mark.parametrize("name", mostly_slow(RECIPES, ["nf4 nested"]))
def test_a_folder_holds_what_the_maker_makes_and_a_copy_of_the_rest(made, name):
    folder, report = made(name)
    lm, plain = mj.load(folder, mesh="1x2"), mj.load("tiny", mesh="1x1", dtype="bfloat16")
    config, original = lm.config, leaves_of(plain)
    specs = leaf_specs(config)
    for path, leaf in leaves_of(lm).items():
        (w,) = canonical(original[path])
        want = quantize_matrix(w, RECIPES[name]) if is_quantized(specs[path]) else w
        for got, part in zip(canonical(leaf), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(got, part, path)
    counts = {row.group: row for row in report.coverage}
    assert sum(row.parameters for row in report.coverage) == report.converted.parameters
    assert sum(row.bytes for row in report.coverage) == report.converted.bytes
    scheme = RECIPES[name].scheme
    assert counts["experts"].scheme == counts["attention"].scheme == scheme
    assert {counts[name].scheme for name in ("router", "norms", "embeddings and head")} == {
        "bfloat16"
    }
    assert len(report.errors) == 7 * config.num_hidden_layers


@pytest.mark.parametrize("scheme", mostly_slow(["int8", "int4", "nf4", "fp8", "fp4"], ["int4"]))
def test_load_makes_the_same_and_tells_the_bytes_that_are_there(made, scheme):
    lines: list[str] = []
    lm = mj.load("tiny", mesh="1x8", dtype="bfloat16", quantize=scheme, note=lines.append)
    folder, _ = made(scheme)
    stored = leaves_of(mj.load(folder, mesh="1x1"))
    live = 0
    for path, leaf in leaves_of(lm).items():
        for part, other in zip(canonical(leaf), canonical(stored[path]), strict=True):
            np.testing.assert_array_equal(part, other, path)
        shards = [array.addressable_shards for array in jax.tree.leaves(leaf)]
        parts = [{shard.index: shard.data.nbytes for shard in own} for own in map(_keyed, shards)]
        live += sum(sum(part.values()) for part in parts)
    total = next(line for line in lines if line.startswith("total"))
    assert int(total.split()[2].replace(",", "")) == live
    experts = next(line for line in lines if line.startswith("experts"))
    assert experts.split()[-1] == scheme
    assert len([line for line in lines if "experts" in line]) == 1
    mesh = MeshSpec.parse("1x8")
    plan = weight_bytes(lm.config, mesh, Strategy(), dtype="bfloat16", scheme=scheme)
    assert plan.total == bytes_held(leaves_of(lm), jax.devices()[3])


def _keyed(shards):
    class Keyed:
        def __init__(self, shard):
            self.index, self.data = str(shard.index), shard.data

    return [Keyed(shard) for shard in shards]


@pytest.mark.parametrize("text", mostly_slow(["1x2x2", "1x4x2"], ["1x2x2"]))
@pytest.mark.parametrize("name", mostly_slow(["nf4 nested", "int4", "int8"], ["nf4 nested"]))
def test_a_tensor_axis_gives_the_same_logits(made, name, text):
    folder, _ = made(name)
    want = mj.load(folder, mesh="1x1", dtype="float32").logits([PROMPTS[1]])
    got = mj.load(folder, mesh=text, dtype="float32").logits([PROMPTS[1]])
    np.testing.assert_allclose(got, want, atol=2e-3)


def test_plan_equals_the_arrays_on_a_split_mesh():
    lm = mj.load("tiny", mesh="1x2x2", dtype="bfloat16", quantize="nf4")
    spec = MeshSpec.parse("1x2x2")
    plan = weight_bytes(lm.config, spec, Strategy(), dtype="bfloat16", scheme="nf4")
    assert plan.total == bytes_held(leaves_of(lm), jax.devices()[1])


def replace_leaf(folder: Path, leaf: str, parts: list[str], value: np.ndarray) -> None:
    """Puts a plain leaf where quantized parts were, digests and all."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    leaves = {name: LeafRecord.of(entry) for name, entry in raw["leaves"].items()}
    for part in parts:
        del leaves[part]
    write_leaf(folder, leaf, value)
    chunks = tuple(sha256(part) for part in (value if value.ndim == 3 else [value]))
    leaves[leaf] = LeafRecord(shape=value.shape, dtype=value.dtype.name, chunks=chunks)
    dataclasses.replace(read_manifest(folder), leaves=leaves).write(folder)


@pytest.mark.parametrize("asked", [None, "int8"])
def test_an_expert_that_is_not_quantized_fails_the_load(tmp_path, small, asked):
    quantize_checkpoint(small, tmp_path / "q", Recipe(scheme="int8"))
    mj.load(tmp_path / "q", mesh="1x1", quantize=asked)
    convert(small, tmp_path / "plain")
    leaf = "layers.0.moe.experts.up"
    parts = [f"{leaf}.int8.codes", f"{leaf}.int8.scales"]
    replace_leaf(tmp_path / "q", leaf, parts, read_leaf(tmp_path / "plain", leaf))
    lines: list[str] = []
    with pytest.raises(MixtralError, match=f"{leaf} is in bfloat16: experts .*got 66.7 %") as error:
        mj.load(tmp_path / "q", mesh="1x1", quantize=asked, note=lines.append)
    assert error.value.code == BAD_DATA
    assert any(line.startswith("experts") for line in lines)


def test_coverage_is_counted_from_the_files(tmp_path, small, monkeypatch):
    """A part that was lost on its way to the disk is not counted because it was meant to be."""
    write = OrbaxOutput.write
    lost = "layers.0.moe.experts.up.int8.codes"

    def lose(self, leaf, value):
        write(self, leaf, value)
        if leaf == lost:
            next((self.folder / WEIGHTS / leaf).rglob("1.0.0")).unlink()

    monkeypatch.setattr(OrbaxOutput, "write", lose)
    with pytest.raises(MixtralError, match=r"up.int8.codes: 1.0.0: .* no file") as refusal:
        quantize_checkpoint(small, tmp_path / "q", Recipe(scheme="int8"))
    assert refusal.value.code == BAD_DATA


def test_experts_of_more_bits_than_asked_fail():
    from mixtral_jax.quantize.coverage import check_experts

    config = read_config(EMBEDDED_FOLDER, note=print)
    specs = leaf_specs(config)
    w = quantize_matrix(np.ones((8, 256, 128), np.float32), Recipe(scheme="int8"))
    path = "layers.0.moe.experts.gate"
    check_experts({path: w}, specs, bits=8)
    with pytest.raises(MixtralError, match=r"at most 4 bits: expected 100 %, got 0\.0 %"):
        check_experts({path: w}, specs, bits=4)
    with pytest.raises(MixtralError, match="experts in few bits"):
        check_experts({path: np.ones((8, 256, 128))}, specs)


def test_a_missing_part_and_a_changed_byte_are_found(tmp_path, small):
    dst = tmp_path / "q"
    quantize_checkpoint(small, dst, Recipe(scheme="int8"))
    codes = dst / WEIGHTS / "layers.0.moe.experts.up.int8.codes"
    file = next(path for path in codes.rglob("1.0.0"))
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    with pytest.raises(MixtralError, match=r"up.int8.codes\[1\]: its bytes are not those"):
        mj.load(dst, mesh="1x1")
    manifest = read_manifest(dst)
    leaves = {p: r for p, r in manifest.leaves.items() if not p.endswith("up.int8.scales")}
    dataclasses.replace(manifest, leaves=leaves).write(dst)
    with pytest.raises(MixtralError, match=r"missing layers.0.moe.experts.up.int8.scales"):
        mj.load(dst, mesh="1x1")


def test_scales_of_groups_that_do_not_divide_the_inputs_are_refused(tmp_path, small):
    """As a manifest of other tools could have them; no reshape may meet them."""
    dst = tmp_path / "q"
    quantize_checkpoint(small, dst, Recipe(scheme="int4"))
    leaf = "layers.0.attention.q_proj.int4.scales"
    scales = np.ones((64, 5), np.float32)
    shutil.rmtree(dst / WEIGHTS / leaf)
    replace_leaf(dst, leaf, [leaf], scales)
    with pytest.raises(MixtralError, match=r"q_proj.int4.scales: expected shape") as refusal:
        mj.load(dst, mesh="1x1")
    assert refusal.value.code == BAD_DATA


def test_weights_that_stay_plain_are_proved_while_others_are_quantized(tmp_path, small):
    folder = tmp_path / "ours"
    convert(small, folder)
    mj.load(folder, mesh="1x2", quantize="int8")
    file = next(path for path in (folder / WEIGHTS / "lm_head").rglob("0.0"))
    content = bytearray(file.read_bytes())
    content[6] ^= 16
    file.write_bytes(content)
    with pytest.raises(MixtralError, match=r"lm_head: its bytes are not those") as refusal:
        mj.load(folder, mesh="1x2", quantize="int8")
    assert refusal.value.code == BAD_DATA
    mj.load(folder, mesh="1x2", quantize="int8", verify=False)


def test_scales_do_not_wait_for_the_codes_of_other_weights(monkeypatch):
    """On the host there are the scales of the weights that threads are at, and no more."""
    most, made = [0], QuantizingLeaves._make

    def make(self, part, chunk):
        found = made(self, part, chunk)
        most[0] = max(most[0], sum(value.nbytes for value in list(self._waiting.values())))
        return found

    monkeypatch.setattr(QuantizingLeaves, "_make", make)
    lm = mj.load("tiny", mesh="1x1", quantize="nf4", dtype="bfloat16")
    flat = jax.tree.leaves(nnx.state(lm.model), is_leaf=lambda w: isinstance(w, QTensor))
    scales = [w.scales.nbytes for w in flat if isinstance(w, QTensor)]
    assert 0 < most[0] <= THREADS * max(scales) < sum(scales)


def test_quantizing_what_is_quantized_is_refused(tmp_path, small):
    quantize_checkpoint(small, tmp_path / "q", Recipe(scheme="int8"))
    for act in (
        lambda: quantize_checkpoint(tmp_path / "q", tmp_path / "r", Recipe(scheme="int4")),
        lambda: mj.load(tmp_path / "q", mesh="1x1", quantize="nf4"),
    ):
        with pytest.raises(MixtralError, match="is quantized already") as refusal:
            act()
        assert refusal.value.code == BAD_DATA
    with pytest.raises(MixtralError, match="neither exported nor merged") as refusal:
        convert(tmp_path / "q", tmp_path / "r", ConvertOptions(format="safetensors"))
    assert refusal.value.code == BAD_DATA
    assert not (tmp_path / "r").exists()


def test_another_recipe_does_not_take_over_the_destination(tmp_path, small):
    dst = tmp_path / "q"
    first = quantize_checkpoint(small, dst, Recipe(scheme="int8"))
    again = quantize_checkpoint(small, dst, Recipe(scheme="int8"))
    assert again.converted.digest == first.converted.digest
    assert again.coverage == first.coverage
    with pytest.raises(MixtralError, match="holds another conversion") as refusal:
        quantize_checkpoint(small, dst, Recipe(scheme="nf4"))
    assert refusal.value.code == OUTPUT_EXISTS


def test_rows_of_no_whole_groups_are_refused_before_any_work(tmp_path, small):
    with pytest.raises(MixtralError, match="--group-size 64") as refusal:
        quantize_checkpoint(small, tmp_path / "q", Recipe(scheme="int4", group_size=128))
    assert refusal.value.code == BAD_CONFIG
    assert not (tmp_path / "q").exists()
    assert not (tmp_path / "q.partial").exists()


def test_values_that_are_no_numbers_are_refused_by_tensor(tmp_path, small_config):
    config = small_config(hidden_size=64, head_dim=16, num_hidden_layers=1, num_local_experts=2)
    tensors = checkpoints.random_tensors(config)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    tensors[name][3, 4] = np.inf
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    with pytest.raises(MixtralError, match=f"{name}: NaN or infinite") as refusal:
        quantize_checkpoint(src, tmp_path / "q", Recipe(scheme="nf4"))
    assert refusal.value.code == BAD_DATA
    assert not (tmp_path / "q.partial").exists()


@pytest.mark.parametrize("cut", mostly_slow([0, 3, 8, 20], [8]))
def test_an_interrupted_run_is_resumed_to_the_same_digest_and_report(tmp_path, small, cut):
    recipe = Recipe(scheme="nf4", double_quant=True)
    report = quantize_checkpoint(small, tmp_path / "whole", recipe)
    whole = report.converted
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > cut

    with pytest.raises(MixtralError) as refusal:
        quantize_checkpoint(small, tmp_path / "q", recipe, stop=stop)
    assert refusal.value.code == INTERRUPTED
    lines: list[str] = []
    again = quantize_checkpoint(small, tmp_path / "q", recipe, note=lines.append)
    resumed = again.converted
    assert again.errors == report.errors
    assert len(again.errors) == 7, "those that the interrupted run made, too"
    finished = quantize_checkpoint(small, tmp_path / "q", recipe)
    assert (finished.errors, finished.coverage) == (report.errors, report.coverage)
    assert resumed.digest == whole.digest
    assert resumed.parameters == whole.parameters
    assert any(f"resuming: {cut} of" in line for line in lines) == (cut > 0)


def test_errors_are_those_of_the_dequantized(made):
    folder, report = made("nf4 nested")
    lm, plain = mj.load(folder, mesh="1x1", dtype="float32"), mj.load("tiny", mesh="1x1")
    path = "layers.1.moe.experts.down"
    leaf = leaves_of(lm)[path]
    w = canonical(leaves_of(plain)[path])[0]
    assert isinstance(leaf, QTensor)
    got = np.asarray(leaf.dequantize())
    relative = np.linalg.norm(got - w) / np.linalg.norm(w)
    assert math.isclose(report.errors[path].relative, relative, rel_tol=1e-4)
    groups = (got - w).reshape(*w.shape[:2], -1, 64), w.reshape(*w.shape[:2], -1, 64)
    worst = (np.linalg.norm(groups[0], axis=-1) / np.linalg.norm(groups[1], axis=-1)).max()
    assert math.isclose(report.errors[path].worst, worst, rel_tol=1e-4)
