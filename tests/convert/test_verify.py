"""What tells one conversion from another, and what is read again before it is believed."""

from __future__ import annotations

import json
import os
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.convert import ConvertOptions, convert, orbax
from mixtral_jax.convert.names import Chunk
from mixtral_jax.convert.orbax_leaves import chunk_path
from mixtral_jax.errors import BAD_DATA, INTERRUPTED, OUTPUT_EXISTS, MixtralError
from tests.convert import checkpoints

NORM = "model.norm.weight"
EXPERT = "layers.0.moe.experts.up"
VERIFY = ConvertOptions(verify=True)


def refusal(src: Path, dst: Path, options: ConvertOptions | None = None) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        convert(src, dst, options)
    return caught.value


def flip(path: Path, position: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(bytes(content))


def interrupted(src: Path, dst: Path, num_leaves: int = 8) -> Path:
    left = iter(range(num_leaves))
    with pytest.raises(MixtralError) as caught:
        convert(src, dst, stop=lambda: next(left, None) is None)
    assert caught.value.code == INTERRUPTED
    return dst.with_name(f"{dst.name}.partial")


@pytest.fixture
def other(tmp_path, config, tensors) -> Path:
    """The same header, other weights, and the same time."""
    changed = {name: w[::-1].copy() for name, w in tensors.items()}
    folder = checkpoints.write(tmp_path / "other", config, changed)
    return folder


def test_other_weights_under_the_same_header_are_another_conversion(tmp_path, original, other):
    sizes = {(folder / "model.safetensors").stat().st_size for folder in (original, other)}
    assert len(sizes) == 1
    convert(original, tmp_path / "out")
    assert refusal(other, tmp_path / "out").code == OUTPUT_EXISTS


def test_a_copy_of_the_source_is_the_same_conversion(tmp_path, config, tensors, original):
    digest = convert(original, tmp_path / "out").digest
    copy = checkpoints.write(tmp_path / "copy", config, tensors)
    assert convert(copy, tmp_path / "out", VERIFY).digest == digest
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_resuming_with_another_source_is_refused(tmp_path, original, other):
    work = interrupted(original, tmp_path / "out")
    time = (original / "model.safetensors").stat().st_mtime_ns
    os.utime(other / "model.safetensors", ns=(time, time))
    error = refusal(other, tmp_path / "out")
    assert error.code == OUTPUT_EXISTS
    assert f"delete {work}" in str(error)


def test_resuming_after_the_source_was_touched_is_refused(tmp_path, config, tensors):
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    interrupted(src, tmp_path / "out")
    os.utime(src / "model.safetensors", ns=(1, 1))
    assert refusal(src, tmp_path / "out").code == OUTPUT_EXISTS


@pytest.mark.parametrize("verify", [False, True])
def test_finished_leaf_with_a_flipped_bit_is_converted_again(tmp_path, original, verify):
    expected = convert(original, tmp_path / "whole").digest
    work = interrupted(original, tmp_path / "out")
    leaf = json.loads((work / "journal.jsonl").read_bytes().splitlines()[-1])["leaf"]
    path = work / "output" / "weights" / leaf / "state" / leaf
    flip(next(file for file in sorted(path.iterdir()) if file.name[0] == "0"), 1)
    notes: list[str] = []
    digest = convert(
        original, tmp_path / "out", ConvertOptions(verify=verify), note=notes.append
    ).digest
    assert digest == expected
    assert any(line.startswith(f"{leaf} is no longer") for line in notes)
    assert convert(original, tmp_path / "out", VERIFY).digest == expected


def test_complete_output_with_a_flipped_bit_is_refused_under_verify(tmp_path, original):
    convert(original, tmp_path / "out")
    flip(chunk_path(tmp_path / "out", Chunk(EXPERT, 5), 3), 7)
    error = refusal(original, tmp_path / "out", VERIFY)
    assert error.code == BAD_DATA
    assert str(error).startswith(EXPERT)
    assert convert(original, tmp_path / "out").tensors  # the negative control


def test_content_that_the_sample_misses_is_seen_under_verify(
    tmp_path, config, tensors, original, monkeypatch
):
    monkeypatch.setattr("mixtral_jax.convert.safetensors_file.SAMPLE_BYTES", 1)
    changed = tensors | {NORM: tensors[NORM].copy()}
    changed[NORM].view(np.uint16)[3] ^= 1
    src = checkpoints.write(tmp_path / "hf", config, changed)
    convert(original, tmp_path / "out")
    assert convert(src, tmp_path / "out").tensors  # the sample misses it
    error = refusal(src, tmp_path / "out", VERIFY)
    assert error.code == OUTPUT_EXISTS
    assert "norm.weight differs" in str(error)


def test_complete_output_that_orbax_cannot_read_is_refused_under_verify(tmp_path, original):
    convert(original, tmp_path / "out")
    damaged = [*(tmp_path / "out" / "weights" / "norm.weight").rglob("_*METADATA")]
    assert damaged
    for path in damaged:
        path.write_bytes(b"{")
    error = refusal(original, tmp_path / "out", VERIFY)
    assert error.code == BAD_DATA
    assert str(error).startswith("norm.weight")


def test_no_leaf_is_held_while_orbax_reads_it_back(tmp_path, original, monkeypatch):
    """Orbax needs two leaves for itself, which is all that is promised."""
    write_leaf, read_leaf = orbax.write_leaf, orbax.read_leaf
    held: list[weakref.ref[np.ndarray]] = []
    is_free: list[bool] = []

    def write(folder, leaf, value):
        held.append(weakref.ref(value.base))
        write_leaf(folder, leaf, value)

    def read(folder, leaf):
        until = time.monotonic() + 10  # Orbax's threads let go of a leaf a moment after writing it
        while held[-1]() is not None and time.monotonic() < until:
            time.sleep(0.01)
        is_free.append(held[-1]() is None)
        return read_leaf(folder, leaf)

    monkeypatch.setattr(orbax, "write_leaf", write)
    monkeypatch.setattr(orbax, "read_leaf", read)
    convert(original, tmp_path / "out", VERIFY)
    assert is_free == [True] * len(held)
    assert held


@pytest.mark.parametrize("options", [None, VERIFY])
def test_stop_is_asked_before_finished_leaves_are_proved(tmp_path, original, options):
    interrupted(original, tmp_path / "out")
    with pytest.raises(MixtralError, match="interrupted"):
        convert(original, tmp_path / "out", options, stop=lambda: True)
    notes: list[str] = []
    convert(original, tmp_path / "out", options, note=notes.append)
    assert notes[0].startswith("resuming: 8 of ")
    asked = iter([False, True])
    if options is VERIFY:
        with pytest.raises(MixtralError, match="interrupted"):
            convert(original, tmp_path / "out", options, stop=lambda: next(asked))


def test_a_small_file_that_changed_is_another_conversion(tmp_path, config, tensors):
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    template = src / "tokenizer_config.json"
    template.write_text('{"a": 1}')
    convert(src, tmp_path / "out")
    notes: list[str] = []
    convert(src, tmp_path / "out", note=notes.append)
    assert "compared by samples with its source; --verify proves it" in notes[0]
    convert(src, tmp_path / "out", VERIFY, note=notes.append)
    assert "compared with its source, every byte" in notes[1]
    template.write_text('{"a": 2}')
    error = refusal(src, tmp_path / "out")
    assert error.code == OUTPUT_EXISTS
    assert "holds another conversion (of other companions)" in str(error)
    assert template.read_text() != (tmp_path / "out" / template.name).read_text()


def test_a_small_file_may_change_before_the_end(tmp_path, config, tensors):
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    template = src / "tokenizer_config.json"
    template.write_text('{"a": 1}')
    interrupted(src, tmp_path / "out")
    template.write_text('{"a": 2}')
    convert(src, tmp_path / "out")
    assert (tmp_path / "out" / template.name).read_text() == '{"a": 2}'
    assert convert(src, tmp_path / "out", VERIFY).tensors


def test_our_config_is_proved_before_it_is_believed(tmp_path, original):
    convert(original, tmp_path / "ours")
    path = tmp_path / "ours" / "config.json"
    path.write_text(path.read_text().replace("1e-05", "0.5"))
    error = refusal(tmp_path / "ours", tmp_path / "out", ConvertOptions(format="safetensors"))
    assert error.code == BAD_DATA
    assert f"{path} was altered" in str(error)
    assert not (tmp_path / "out").exists()
