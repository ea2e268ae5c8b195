"""Every layout in gives the same weights and one digest; what goes out is what came in."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import mixtral_jax as mj
from mixtral_jax.config import MISPUBLISHED_WINDOW, PRESETS, read_config
from mixtral_jax.convert import ConvertOptions, convert, load_weights
from mixtral_jax.convert.leaves import PublishedLeaves
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.convert.names import LAYOUTS, pieces
from mixtral_jax.convert.orbax_leaves import OrbaxLeaves
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, USAGE, MixtralError
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import weight_shardings
from tests.convert import checkpoints, native
from tests.slow import mostly_slow

NATIVE = ("native", "native_stacked")
SAFETENSORS = ConvertOptions(format="safetensors")


def write(layout, folder, config, tensors, *, num_files=1) -> Path:
    if layout in NATIVE:
        return native.write_layout(layout, folder, config, tensors, num_files=num_files)
    written = {
        "original": tensors,
        "fused": checkpoints.fused(tensors, config),
        "unfused": checkpoints.unfused(tensors),
    }[layout]
    return checkpoints.write(folder, config, written, num_files=num_files)


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    """What the safetensors library finds in a folder, through the index if there is one."""
    index = folder / "model.safetensors.index.json"
    files = {path.name for path in folder.glob("*.safetensors")}
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        assert set(weight_map.values()) == files
    found = {}
    for name in sorted(files):
        with safe_open(folder / name, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118 - not a dict
                assert not index.exists() or weight_map[key] == name
                found[key] = file.get_tensor(key)
    return found


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert checkpoints.same_bits(found[name], expected[name]), name


def loaded(folder: Path, config) -> dict[str, np.ndarray]:
    spec = MeshSpec.parse("1x1").fit(config)
    shardings = weight_shardings(leaf_specs(config), spec.build())
    found = load_weights(
        folder,
        config,
        sharding_of=lambda leaf: shardings[leaf],
        layout="stacked",
    )
    return {leaf: np.asarray(jax.device_get(w)) for leaf, w in found.items()}


def refusal(src, dst, options=None) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        convert(src, dst, options)
    assert not dst.exists()
    return caught.value


@pytest.mark.parametrize("dtype", mostly_slow(["float32", "bfloat16", "float16"], []))
def test_all_layouts_give_one_digest_and_the_same_leaves(tmp_path, small_config, dtype):
    config = small_config(dtype=dtype)
    tensors = checkpoints.random_tensors(config)
    expected = checkpoints.leaves(tensors, config)
    digests = set()
    for layout in LAYOUTS:
        for num_files in (1, 3):
            name = f"{layout}{num_files}"
            src = write(layout, tmp_path / name, config, tensors, num_files=num_files)
            assert_same(loaded(src, config), expected)
            out = tmp_path / f"{name}.out"
            digests.add(convert(src, out).digest)
            assert read_manifest(out).source == {"name": name, "layout": layout}
            assert_same(loaded(out, config), expected)
    assert len(digests) == 1


@pytest.mark.parametrize("fault", ["rope", "transpose"])
def test_a_matrix_that_is_not_transformed_as_published_is_noticed(
    tmp_path, config, tensors, original, fault
):
    wrong = native.stacked(tensors, config)
    if fault == "rope":
        key = "layers.0.attention.wq.weight"
        wrong[key] = tensors["model.layers.0.self_attn.q_proj.weight"]
    else:  # [D, F] laid down where [F, D] belongs
        key = "layers.0.block_sparse_moe.w2"
        old = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
        experts = (tensors[old.format(e)] for e in range(config.num_local_experts))
        wrong[key] = np.concatenate([w.reshape(w.shape[::-1]) for w in experts])
    src = native.write(tmp_path / "wrong", native.params_of_first_release(config), wrong)
    assert convert(src, tmp_path / "out").digest != convert(original, tmp_path / "right").digest


def test_table_names_the_tensors_of_the_independent_native_writer(config, tensors):
    for layout, written in (
        ("native", native.per_expert(tensors, config)),
        ("native_stacked", native.stacked(tensors, config)),
    ):
        named = {p.rows.tensor: p.tensor_shape for p in pieces(layout, leaf_specs(config))}
        assert named == {name: w.shape for name, w in written.items()}


def test_params_json_of_both_kinds_says_what_config_json_says(tmp_path, config, tensors):
    expected = dataclasses.replace(config, max_position_embeddings=32768)
    for layout in NATIVE:
        notes: list[str] = []
        src = write(layout, tmp_path / layout, config, tensors)
        assert read_config(src, note=notes.append) == expected
        assert len(notes) == 1
        assert "no context length: 32768 tokens" in notes[0]
        convert(src, tmp_path / f"{layout}.out")
        assert read_config(tmp_path / f"{layout}.out") == expected


def test_params_json_of_8x22b_and_the_published_window(tmp_path):
    config = PRESETS["mixtral-8x22b"]
    params = native.params_of_mistral_inference(config)
    for more, theta in (({}, 1e6), ({"rope_theta": 5e5}, 5e5)):
        params = {k: v for k, v in params.items() if k != "rope_theta"} | more
        params["_sliding_window"] = str(MISPUBLISHED_WINDOW)
        (tmp_path / "params.json").write_text(json.dumps(params))
        notes: list[str] = []
        assert read_config(tmp_path, note=notes.append) == dataclasses.replace(
            config, rope_theta=theta
        )
        assert any("publishing mistake" in note for note in notes)
        assert ("no rope_theta" in " ".join(notes)) == (not more)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moe": None}, "field moe: expected the number of experts"),
        ({"moe": 8}, "field moe: expected a JSON object"),
        ({"hidden_size": 7}, "field hidden_size: expected 32, as under its other name"),
        ({"quantization": {"qformat_weight": "fp8"}}, "field quantization: expected weights in"),
    ],
)
def test_params_json_that_cannot_be_followed_is_refused(tmp_path, config, change, words):
    params = native.params_of_mistral_inference(config) | change
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(MixtralError, match=words) as caught:
        read_config(tmp_path)
    assert caught.value.code == BAD_CONFIG


def test_all_problems_of_native_files_are_listed_at_once(tmp_path, config, tensors):
    found = native.stacked(tensors, config)
    del found["layers.0.block_sparse_moe.w1"]
    found["layers.1.block_sparse_moe.w2"] = found["layers.1.block_sparse_moe.w2"].T
    found["layers.1.block_sparse_moe.bias"] = np.ones(3, np.float32)
    src = native.write(tmp_path / "src", native.params_of_first_release(config), found)
    line = str(refusal(src, tmp_path / "out"))
    assert "3 problem(s)" in line
    assert "missing layers.0.block_sparse_moe.w1" in line
    assert "extra layers.1.block_sparse_moe.bias" in line
    assert "layers.1.block_sparse_moe.w2: expected shape" in line


def test_a_tensor_in_two_native_files_is_refused(tmp_path, config, tensors):
    src = write("native", tmp_path / "src", config, tensors, num_files=2)
    part = src / "consolidated.02.safetensors"
    save_file({"norm.weight": tensors["model.norm.weight"]}, part)
    error = refusal(src, tmp_path / "out")
    assert error.code == BAD_DATA
    assert "norm.weight is in both consolidated.0" in str(error)
    part.rename(src / "consolidated.safetensors")
    assert "has both consolidated.safetensors and" in str(refusal(src, tmp_path / "out"))


def test_native_files_beside_those_of_hugging_face_are_named_and_left(tmp_path, config, tensors):
    src = write("original", tmp_path / "src", config, tensors)
    native.write(src, {}, native.per_expert(tensors, config))
    notes: list[str] = []
    convert(src, tmp_path / "out", note=notes.append)
    assert f"{src}: not read: consolidated.safetensors" in notes
    assert read_manifest(tmp_path / "out").source["layout"] == "original"


@pytest.mark.parametrize("name", ["w.qweight", "w.weight.absmax", "w.SCB"])
def test_quantized_files_are_refused_by_what_they_are(tmp_path, config, tensors, name):
    src = checkpoints.write(tmp_path / "q", config, tensors | {name: np.ones(3, np.int32)})
    error = refusal(src, tmp_path / "out")
    assert error.code == BAD_DATA
    expected = "expected weights in f32, bf16 or f16, as config.json has it, got a"
    assert f"{name}: {expected}" in str(error)


SIZES = [(1, "9KB"), (2, None), (19, "40KB")]


@pytest.mark.parametrize("sizes", mostly_slow(SIZES, SIZES[1:2]))
def test_round_trip_keeps_every_byte(tmp_path, config, tensors, sizes):
    num_files, size = sizes
    src = write("original", tmp_path / "src", config, tensors, num_files=num_files)
    options = ConvertOptions(format="safetensors", max_shard_size=size)
    digest = convert(src, tmp_path / "ours").digest
    for source in (src, tmp_path / "ours"):
        out = tmp_path / f"{source.name}.back"
        report = convert(source, out, options)
        assert report.digest == digest
        assert report.tensors == len(tensors)
        assert_same(tensors_in(out), tensors)
        files = list(out.glob("*.safetensors"))
        assert len(files) == 1 if size is None else len(files) > 2
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
        if size is not None:
            largest = max(w.nbytes for w in tensors.values())
            limit = max(largest, int(size[:-2]) * 1000)
            headers = 12_000
            assert all(path.stat().st_size <= limit + headers for path in files)
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(w.nbytes for w in tensors.values())
    assert convert(tmp_path / "ours.back", tmp_path / "again").digest == digest


@pytest.mark.parametrize("layout", [*NATIVE, "fused"])
def test_export_has_the_published_names_whatever_came_in(tmp_path, config, tensors, layout):
    src = write(layout, tmp_path / "src", config, tensors)
    convert(src, tmp_path / "out", SAFETENSORS)
    assert_same(tensors_in(tmp_path / "out"), tensors)


def test_leaves_of_several_dtypes_are_exported_aligned(tmp_path, config, tensors):
    mixed = dict(tensors)
    for name in ("model.norm.weight", "model.layers.0.block_sparse_moe.gate.weight"):
        mixed[name] = tensors[name].astype(np.float32)
    src = checkpoints.write(tmp_path / "src", config, mixed)
    convert(src, tmp_path / "out", SAFETENSORS)
    assert_same(tensors_in(tmp_path / "out"), mixed)
    leaves = PublishedLeaves(tmp_path / "out", leaf_specs(config), head_dim=config.head_dim)
    for tensor in leaves.checkpoint.tensors.values():
        assert tensor.start % {"F32": 4, "BF16": 2}[tensor.dtype] == 0


def test_our_folder_is_a_source_where_something_changes(tmp_path, config, tensors, converted):
    report = convert(converted, tmp_path / "f32", ConvertOptions(dtype="float32"))
    expected = {k: w.astype(np.float32) for k, w in checkpoints.leaves(tensors, config).items()}
    assert report.digest == OrbaxLeaves(tmp_path / "f32", leaf_specs(config)).manifest.digest
    assert_same(loaded(tmp_path / "f32", config), expected)
    chunk = next((tmp_path / "f32").glob("weights/layers.1.moe.experts.down/state/*/3.0.0"))
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    for dtype in ("keep", "bfloat16"):
        options = ConvertOptions(format="safetensors", dtype=dtype)
        error = refusal(tmp_path / "f32", tmp_path / f"out-{dtype}", options)
        assert error.code == BAD_DATA
        assert "layers.1.moe.experts.down[3]: its bytes are not those" in str(error)


@pytest.mark.parametrize("damage", ["flip", "header", "truncate", "missing"])
def test_damaged_export_is_noticed(tmp_path, config, original, damage):
    options = ConvertOptions(format="safetensors", max_shard_size="20KB", verify=True)
    convert(original, tmp_path / "out", options)
    convert(original, tmp_path / "out", options)  # sound: nothing to do, and no complaint
    path = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[-3 if damage == "flip" else 20] ^= 1
        path.write_bytes(content[:-1] if damage == "truncate" else content)
    with pytest.raises(MixtralError) as caught:
        convert(original, tmp_path / "out", options)
    assert caught.value.code == BAD_DATA
    words = "its bytes in" if damage == "flip" else f"{path} is missing, truncated or was altered"
    assert words in str(caught.value)


@pytest.mark.parametrize("fault", mostly_slow(["flip", "manifest", "other weights"], ["flip"]))
def test_our_export_is_proved_where_it_is_read(tmp_path, config, tensors, original, fault):
    out = tmp_path / "out"
    convert(original, out, SAFETENSORS)
    assert loaded(out, config)
    file, manifest = out / "model.safetensors", out / "manifest.json"
    words = "its bytes are not those that were written"
    if fault == "flip":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif fault == "manifest":
        manifest.write_text(manifest.read_text().replace('"bfloat16"', '"float32"'))
        words = "manifest.json does not agree"
    else:
        checkpoints.write(out, config, {name: w.astype("float32") for name, w in tensors.items()})
        words = "manifest.json is of other weights"
    for read in (lambda: loaded(out, config), lambda: convert(out, tmp_path / "again")):
        with pytest.raises(MixtralError, match=f"{words}.*fix: convert") as caught:
            read()
        assert caught.value.code == BAD_DATA
    manifest.write_text('{"of": "another tool"}')
    assert loaded(out, config)


@pytest.mark.parametrize("size", ["", "0", "5", "x", "-1GB", "1TBB", "1.5GB", "5gb", "5 GiB"])
def test_shard_size_is_read_as_transformers_does_or_refused(size):
    if size in ("5", "5gb", "5 GiB"):
        assert ConvertOptions(format="safetensors", max_shard_size=size)
        return
    with pytest.raises(MixtralError, match="--max-shard-size: expected a size") as caught:
        ConvertOptions(format="safetensors", max_shard_size=size)
    assert caught.value.code == USAGE


def test_exported_and_imported_model_says_the_same(tmp_path):
    convert(EMBEDDED_FOLDER, tmp_path / "ours")
    sharded = ConvertOptions(format="safetensors", max_shard_size="2MB")
    convert(tmp_path / "ours", tmp_path / "hf", sharded)
    convert(tmp_path / "hf", tmp_path / "again")
    options = SamplingOptions(max_new_tokens=12, temperature=0)
    said = [
        mj.load(folder, mesh="1x8", dtype="float32").generate(
            ["What is 12 + 30?"], options=options
        )[0]
        for folder in ("tiny", tmp_path / "hf", tmp_path / "again")
    ]
    assert said[0].token_ids
    assert said[0].token_ids == said[1].token_ids == said[2].token_ids
