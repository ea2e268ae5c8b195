"""Crafted, truncated and lying safetensors files are refused by name, at once, without a crash."""

from __future__ import annotations

import json
import struct
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mixtral_jax.convert.leaves import PublishedLeaves
from mixtral_jax.convert.reader import INDEX_NAME, Checkpoint
from mixtral_jax.convert.safetensors_file import MAX_HEADER_BYTES
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.model.transformer import leaf_specs

MAX_SECONDS = 2.0
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file_of(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def refused(folder, content: bytes) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(MixtralError) as caught:
        Checkpoint(folder)
    assert time.perf_counter() - start < MAX_SECONDS
    assert caught.value.code == BAD_DATA
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def entry(**changes: object) -> dict[str, object]:
    return {"w": ENTRY | changes}


CRAFTED = {
    "empty file": (b"", "not a safetensors"),
    "seven bytes": (b"1234567", "not a safetensors"),
    "length 2^63": (struct.pack("<Q", 2**63) + b"{}", "header length"),
    "length 2^64 - 1": (b"\xff" * 16, "header length"),
    "header over the limit": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "header length"),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", "truncated"),
    "not JSON": (file_of(b"{nonsense}"), "JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "JSON"),
    "a list": (file_of([]), "JSON"),
    "deep nesting": (file_of(b'{"w":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), "JSON"),
    "a huge number": (file_of(b'{"w":' + b"9" * 5000 + b"}"), "JSON"),
    "duplicate keys": (
        file_of(b'{"w":%b,"w":%b}' % ((json.dumps(ENTRY).encode(),) * 2)),
        "duplicate",
    ),
    "an entry that is no object": (file_of({"w": 3}), "object"),
    "a NUL in a name": (file_of({"w\0": ENTRY}), "object"),
    "an unknown dtype": (file_of(entry(dtype="F99")), "dtype"),
    "an extra field": (file_of(entry(more=1)), "fields"),
    "a negative size": (file_of(entry(shape=[-2])), "sizes"),
    "a boolean size": (file_of(entry(shape=[True, 2])), "sizes"),
    "sizes that overflow": (file_of(entry(shape=[2**62, 2**62, 4])), "does not take"),
    "a fraction": (file_of(entry(shape=[2.0])), "sizes"),
    "three offsets": (file_of(entry(data_offsets=[0, 4, 8])), "sizes"),
    "offsets reversed": (file_of(entry(data_offsets=[8, 0])), "bytes 8..0"),
    "offsets past the end": (file_of(entry(shape=[4], data_offsets=[0, 16])), "bytes 0..16"),
    "shape against bytes": (file_of(entry(shape=[3])), "does not take"),
    "a hole": (
        file_of({"w": ENTRY | {"data_offsets": [8, 16]}}, b"\0" * 16),
        "hole",
    ),
    "an overlap": (
        file_of({"v": ENTRY, "w": ENTRY | {"data_offsets": [4, 12]}}, b"\0" * 12),
        "overlaps",
    ),
    "two names for the same bytes": (file_of({"v": ENTRY, "w": ENTRY}), "overlaps"),
    "bytes that belong to nothing": (file_of({"w": ENTRY}, b"\0" * 9), "accounts for"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_file_is_refused(tmp_path, name):
    content, why = CRAFTED[name]
    assert why in refused(tmp_path, content)


def test_the_sound_file_that_the_crafted_ones_vary_is_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(file_of({"__metadata__": {"a": "b"}, "w": ENTRY}))
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensors["w"].shape == (2,)


@given(position=st.integers(0, 200), bit=st.integers(0, 7))
def test_a_flipped_bit_of_the_header_is_refused_or_harmless(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("flip")
    whole = {"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float16)}
    path = folder / "model.safetensors"
    save_file(whole, path)
    content = bytearray(path.read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    content[position % header_end] ^= 1 << bit
    path.write_bytes(bytes(content))
    try:
        checkpoint = Checkpoint(folder)
    except MixtralError as error:
        refusal = error
    else:
        with checkpoint:
            for tensor in checkpoint.tensors.values():
                assert header_end <= tensor.start <= tensor.stop <= len(content)
        return
    assert refusal.code == BAD_DATA


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_truncated_file_is_refused(tmp_path, cut):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(100, np.float32)}, path)
    refused(tmp_path, path.read_bytes()[:-cut])


def test_file_truncated_while_open_is_refused_and_the_process_lives(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.ones(100_000, np.float32)}, path)
    with Checkpoint(tmp_path) as checkpoint:
        with open(path, "r+b") as file:
            file.truncate(5000)
        with pytest.raises(MixtralError, match="truncated") as caught:
            checkpoint.read_rows("a", 0, 100_000, np.empty(100_000, np.float32))
    assert caught.value.code == BAD_DATA


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_are_those_that_were_written(tmp_path, dtype):
    w = np.arange(2 * 5 * 3).reshape(2, 5, 3).astype(dtype)
    v = np.arange(7).astype(dtype)
    save_file({"w": w, "v": v}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        out = np.empty((4, 3), dtype)
        checkpoint.read_rows("w", 3, 7, out)
        assert out.tobytes() == w.reshape(10, 3)[3:7].tobytes()
        out = np.empty(2, dtype)
        checkpoint.read_rows("v", 5, 7, out)
        assert out.tobytes() == v[5:7].tobytes()


def index(folder, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd.safetensors",
        "../x.safetensors",
        "a/../../x.safetensors",
        "a\\x.safetensors",
        "x\0.safetensors",
        "..safetensors",
        "model.bin",
        3,
    ],
)
def test_index_that_names_files_elsewhere_is_refused_before_opening(tmp_path, name):
    index(tmp_path, {"w": name})
    with pytest.raises(MixtralError, match="not a plain") as caught:
        Checkpoint(tmp_path)
    assert caught.value.code == BAD_DATA


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_index_without_a_map_is_refused(tmp_path, weight_map):
    index(tmp_path, weight_map)
    with pytest.raises(MixtralError, match="weight_map") as caught:
        Checkpoint(tmp_path)
    assert caught.value.code == BAD_DATA


def test_missing_shard_is_named(tmp_path):
    index(tmp_path, {"w": "model-00001-of-00001.safetensors"})
    with pytest.raises(MixtralError, match="model-00001-of-00001") as caught:
        Checkpoint(tmp_path)
    assert caught.value.code == INPUT_NOT_FOUND


def test_link_out_of_the_folder_is_refused_and_a_cache_link_is_followed(tmp_path):
    blobs, snapshot = tmp_path / "model" / "blobs", tmp_path / "model" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"w": np.ones(2, np.float32)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    with Checkpoint(snapshot) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model.safetensors").symlink_to(blobs / "0123")
    with pytest.raises(MixtralError, match="link that leaves") as caught:
        Checkpoint(elsewhere)
    assert caught.value.code == BAD_DATA


def test_directory_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(MixtralError, match="regular file") as caught:
        Checkpoint(tmp_path)
    assert caught.value.code == BAD_DATA


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("model.pt", "save_pretrained"),
        ("consolidated.00.pth", "save_file"),
        ("consolidated.07.pt", "save_file"),
    ],
)
def test_pickles_are_refused_by_name_with_the_fix(tmp_path, name, how):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(MixtralError, match=f"{name} is a pickle.*fix: .*{how}") as caught:
        Checkpoint(tmp_path)
    assert caught.value.code == BAD_DATA


def test_empty_and_missing_folders_are_not_found(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(MixtralError) as caught:
            Checkpoint(folder)
        assert caught.value.code == INPUT_NOT_FOUND


def test_a_duplicate_among_very_many_keys_is_refused(tmp_path):
    # Counting each name among the others takes minutes.
    names = [f'"{k}":0' for k in range(60_000)] + ['"59999":0']
    header = f"{{{','.join(names)}}}".encode()
    (tmp_path / "model.safetensors").write_bytes(file_of(header))
    with pytest.raises(MixtralError, match="duplicate key '59999'"):
        Checkpoint(tmp_path)


def test_one_file_beside_an_index_of_others_is_refused(tmp_path):
    for name in ("model.safetensors", "other.safetensors"):
        save_file({"w": np.ones(2, np.float32)}, tmp_path / name)
    index(tmp_path, {"w": "other.safetensors"})
    with pytest.raises(MixtralError, match=r"has both model\.safetensors and .*fix: ") as caught:
        Checkpoint(tmp_path)
    assert caught.value.code == BAD_DATA
    index(tmp_path, {"w": "model.safetensors"})
    with Checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]


def test_index_that_is_a_folder_or_a_link_away_is_refused(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    index(tmp_path, {"w": "model.safetensors"})
    (folder / INDEX_NAME).symlink_to(tmp_path / INDEX_NAME)
    with pytest.raises(MixtralError, match="leaves the checkpoint"):
        Checkpoint(folder)
    (folder / INDEX_NAME).unlink()
    (folder / INDEX_NAME).mkdir()
    with pytest.raises(MixtralError, match="is a folder"):
        Checkpoint(folder)


def test_names_in_files_cannot_reach_the_terminal(tmp_path, small_config):
    evil = "w\n\x1b[31m\u202eerror: all is well"
    save_file({evil: np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(MixtralError) as caught:
        PublishedLeaves(tmp_path, leaf_specs(small_config()), head_dim=8)
    index(tmp_path, {"w": f"{evil}.safetensors"})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MixtralError) as also_caught:
        Checkpoint(tmp_path)
    for error in (caught.value, also_caught.value):
        assert str(error).isprintable()
        assert r"\n\x1b[31m\u202e" in str(error)


def test_shards_without_their_index_say_so(tmp_path):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(MixtralError, match=rf"{INDEX_NAME} is missing; fix: ") as caught:
        Checkpoint(tmp_path)
    assert caught.value.code == INPUT_NOT_FOUND
    with pytest.raises(MixtralError, match=r"no such folder.*fix: "):
        Checkpoint(tmp_path / "nowhere")
