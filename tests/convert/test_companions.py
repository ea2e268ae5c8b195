"""The small files beside the weights: carried under their own names, and proved on load."""

from __future__ import annotations

import json
import os

import jax
import pytest
from jax.sharding import SingleDeviceSharding

from mixtral_jax.convert import ConvertOptions, convert, load_weights
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.tokenizer import find_tokenizer
from tests.convert import checkpoints
from tests.slow import in_turn


@pytest.fixture
def source(tmp_path, config, tensors):
    folder = checkpoints.write(tmp_path / "hf", config, tensors)
    (folder / "mistral_tok.model.v3").write_bytes(b"pieces")
    return folder


def load(folder, config, *, verify=True):
    place = SingleDeviceSharding(jax.devices()[0])
    return load_weights(folder, config, sharding_of=lambda path: place, verify=verify)


def test_tokenizer_of_another_name_travels(tmp_path, source):
    notes: list[str] = []
    convert(source, tmp_path / "out", note=notes.append)
    found = find_tokenizer(tmp_path / "out")
    assert found is not None
    assert found.name == "mistral_tok.model.v3"
    assert found.read_bytes() == b"pieces"
    assert notes == []


def test_what_is_left_behind_is_noted_once(tmp_path, source):
    (source / "tokenizer.json").mkdir()
    (source / "old.model.v1").write_bytes(b"old")
    (source / "params.json").write_text("{}")
    (source / "README.md").write_text("no part of the model")
    notes: list[str] = []
    convert(source, tmp_path / "out", note=notes.append)
    assert notes == ["not copied: 'old.model.v1', 'params.json', 'tokenizer.json'"]


@pytest.mark.parametrize(
    ("name", "how"), in_turn(["config.json", "mistral_tok.model.v3"], ["altered", "missing"])
)
def test_altered_companion_is_refused_naming_it(tmp_path, source, config, name, how):
    convert(source, tmp_path / "out")
    path = tmp_path / "out" / name
    if how == "altered":
        path.write_bytes(path.read_bytes() + b"\n")
    else:
        path.unlink()
    with pytest.raises(MixtralError, match=f"{path}.*{how}.*fix: ") as caught:
        load(tmp_path / "out", config)
    assert caught.value.code == BAD_DATA
    assert load(tmp_path / "out", config, verify=False)
    if name != "config.json":
        with pytest.raises(MixtralError, match=how) as caught:
            convert(source, tmp_path / "out", ConvertOptions(verify=True))
        assert caught.value.code == BAD_DATA


def test_companions_are_no_part_of_the_digest(tmp_path, source):
    digest = convert(source, tmp_path / "out").digest
    (source / "mistral_tok.model.v3").write_bytes(b"other pieces")
    assert convert(source, tmp_path / "again").digest == digest
    manifests = [json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("out", "again")]
    assert set(manifests[0]["companions"]) == {"config.json", "mistral_tok.model.v3"}
    assert manifests[0]["companions"] != manifests[1]["companions"]


@pytest.mark.parametrize(
    "change",
    [
        {"companions": {os.path.join("..", "hf", "config.json"): "0"}},
        {"companions": {"..": "0"}},
        {"companions": {"config.json": 5}},
        {"companions": ["config.json"]},
        {"parameters": "x"},
        {"parameters": True},
        {"bytes": None},
        {"bytes": -1},
        {"fingerprint": None},
        {"source": {"name": 3}},
        {"leaves": []},
        {"leaves": {"norm.weight": {"shape": ["8"], "dtype": "float32", "chunks": ["0"]}}},
    ],
)
def test_manifest_of_other_types_or_of_files_elsewhere_is_refused(converted, tmp_path, change):
    content = json.loads((converted / "manifest.json").read_text())
    assert read_manifest(converted)
    (tmp_path / "manifest.json").write_text(json.dumps(content | change))
    with pytest.raises(MixtralError, match=r"manifest\.json.*altered.*fix: ") as caught:
        read_manifest(tmp_path)
    assert caught.value.code == BAD_DATA
