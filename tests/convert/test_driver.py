"""convert(): one digest for every layout, all or nothing, resumable, errors that say the fix."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from mixtral_jax.config import read_config
from mixtral_jax.convert import ConvertOptions, convert, orbax
from mixtral_jax.convert.names import chunks_of
from mixtral_jax.convert.orbax import read_leaf
from mixtral_jax.convert.orbax_leaves import OrbaxLeaves
from mixtral_jax.errors import (
    BAD_DATA,
    INPUT_NOT_FOUND,
    INTERRUPTED,
    IO_ERROR,
    OUTPUT_EXISTS,
    MixtralError,
)
from mixtral_jax.model.transformer import leaf_specs
from tests.convert import checkpoints
from tests.slow import in_turn

ROOT = Path(__file__).parents[2]
W2 = "model.layers.1.block_sparse_moe.experts.3.w2.weight"


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every leaf of a converted folder through our own reader."""
    config = read_config(folder)
    specs = leaf_specs(config)
    leaves = OrbaxLeaves(folder, specs)
    found = {}
    for leaf, spec in specs.items():
        found[leaf] = np.empty(spec.shape, leaves.dtype(leaf))
        for chunk in chunks_of(leaf, spec.shape):
            part = found[leaf] if chunk.expert is None else found[leaf][chunk.expert]
            leaves.read_rows(chunk, 0, part.shape[0], part)
    return found


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for leaf in expected:
        assert checkpoints.same_bits(found[leaf], expected[leaf]), leaf


def refusal(src, dst, options=None) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        convert(src, dst, options)
    assert "\n" not in str(caught.value)
    return caught.value


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_layout_gives_the_same_leaves_and_one_digest(tmp_path, config, tensors):
    expected = checkpoints.leaves(tensors, config)
    digests = set()
    for layout, written in (("original", tensors), ("fused", checkpoints.fused(tensors, config))):
        for num_files in (1, 3):
            name = f"{layout}{num_files}"
            src = checkpoints.write(tmp_path / name, config, written, num_files=num_files)
            report = convert(src, tmp_path / f"{name}.out")
            assert_same(stored(tmp_path / f"{name}.out"), expected)
            digests.add(report.digest)
            assert report.tensors == len(expected)
            assert report.parameters == sum(w.size for w in expected.values())
            assert report.bytes == sum(w.nbytes for w in expected.values())
            assert report.peak_rss_bytes > 0
    assert len(digests) == 1


def test_digest_sees_one_changed_bit_and_swapped_experts(tmp_path, config, tensors, converted):
    before = OrbaxLeaves(converted, leaf_specs(config)).manifest.digest
    changed = dict(tensors)
    changed[W2] = tensors[W2].copy()
    changed[W2].view(np.uint16)[0, 0] ^= 1
    first, second = (W2.replace("experts.3", f"experts.{e}") for e in (0, 1))
    swapped = tensors | {first: tensors[second], second: tensors[first]}
    for name, other in (("changed", changed), ("swapped", swapped)):
        src = checkpoints.write(tmp_path / name, config, other)
        assert convert(src, tmp_path / f"{name}.out").digest != before


def test_orbax_itself_reads_what_we_wrote(config, tensors, converted):
    expected = checkpoints.leaves(tensors, config)
    assert_same({leaf: read_leaf(converted, leaf) for leaf in expected}, expected)


def test_experts_are_files_of_their_own(config, converted):
    folder = converted / "weights" / "layers.0.moe.experts.gate" / "state"
    files = names_in(folder / "layers.0.moe.experts.gate")
    assert files == [".zarray"] + [f"{e}.0.0" for e in range(config.num_local_experts)]


def test_small_files_travel_and_the_config_describes_the_output(tmp_path, config, tensors):
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    (src / "tokenizer.model").write_bytes(b"\x00pieces")
    (src / "chat_template.jinja").write_text("{{ x }}")
    (src / "notes.txt").write_text("not ours")
    convert(src, tmp_path / "out", ConvertOptions(dtype="float32"))
    assert names_in(tmp_path / "out") == [
        "chat_template.jinja",
        "config.json",
        "manifest.json",
        "tokenizer.model",
        "weights",
    ]
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"\x00pieces"
    assert read_config(tmp_path / "out").dtype == "float32"
    assert names_in(tmp_path) == ["hf", "out"]


def test_small_file_that_links_elsewhere_is_not_copied(tmp_path, config, tensors):
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    (tmp_path / "secret").write_text("key")
    (src / "tokenizer.json").symlink_to(tmp_path / "secret")
    error = refusal(src, tmp_path / "out")
    assert error.code == BAD_DATA
    assert "tokenizer.json" in str(error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "source"), in_turn(["float32", "float16", "bfloat16"], ["float32", "bfloat16"])
)
def test_dtypes_are_cast_as_numpy_casts(tmp_path, small_config, source, dtype):
    config = small_config(dtype=source, num_hidden_layers=1)
    tensors = checkpoints.random_tensors(config)
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    convert(src, tmp_path / "out", ConvertOptions(dtype=dtype, verify=True))
    wanted = checkpoints.DTYPES[dtype]
    expected = {leaf: w.astype(wanted) for leaf, w in checkpoints.leaves(tensors, config).items()}
    assert_same(stored(tmp_path / "out"), expected)


def test_leaves_may_differ_in_dtype(tmp_path, config, tensors):
    router = "model.layers.0.block_sparse_moe.gate.weight"
    mixed = tensors | {router: tensors[router].astype(np.float32)}
    convert(checkpoints.write(tmp_path / "hf", config, mixed), tmp_path / "out")
    assert_same(stored(tmp_path / "out"), checkpoints.leaves(mixed, config))
    assert read_config(tmp_path / "out").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("dtype", "value"), in_turn(["float32", "float16", "bfloat16"], [np.nan, np.inf, -np.inf])
)
def test_a_value_that_is_not_finite_is_refused_by_name_unless_allowed(
    tmp_path, small_config, dtype, value
):
    config = small_config(dtype=dtype)
    tensors = checkpoints.random_tensors(config)
    tensors[W2][-1, -1] = value
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    error = refusal(src, tmp_path / "out")
    assert error.code == BAD_DATA
    assert f"{W2} has NaN or infinite values" in str(error)
    assert not (tmp_path / "out").exists()
    convert(src, tmp_path / "out", ConvertOptions(allow_nonfinite=True))
    assert_same(stored(tmp_path / "out"), checkpoints.leaves(tensors, config))


def test_the_largest_finite_values_are_accepted(tmp_path, config, tensors):
    largest = tensors | {W2: np.full_like(tensors[W2], ml_dtypes.finfo(ml_dtypes.bfloat16).max)}
    src = checkpoints.write(tmp_path / "hf", config, largest)
    assert convert(src, tmp_path / "out").tensors == len(leaf_specs(config))
    error = refusal(src, tmp_path / "half", ConvertOptions(dtype="float16"))
    assert error.code == BAD_DATA
    assert f"{W2} has values too large for float16" in str(error)


def test_a_finished_conversion_is_left_alone_and_reported_again(tmp_path, original):
    notes: list[str] = []
    first = convert(original, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    again = convert(original, tmp_path / "out", note=notes.append)
    assert (again.digest, again.bytes) == (first.digest, first.bytes)
    assert manifest.stat().st_mtime_ns == before
    assert any("complete already" in line for line in notes)


def test_existing_output_of_something_else_is_refused(tmp_path, original):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    error = refusal(original, tmp_path / "out")
    assert error.code == OUTPUT_EXISTS
    assert names_in(tmp_path / "out") == ["thesis.txt"]
    (tmp_path / "out" / "manifest.json").write_text('{"name": "of another tool"}')
    error = refusal(original, tmp_path / "out")
    assert error.code == OUTPUT_EXISTS
    assert "delete" not in str(error)
    convert(original, tmp_path / "ours")
    assert refusal(original, tmp_path / "ours", ConvertOptions(dtype="float32")).code == (
        OUTPUT_EXISTS
    )


def test_converted_folder_is_no_source(tmp_path, converted):
    assert refusal(converted, tmp_path / "out").code == BAD_DATA


def test_source_and_parent_must_exist(tmp_path, original):
    assert refusal(tmp_path / "nowhere", tmp_path / "out").code == INPUT_NOT_FOUND
    assert refusal(original, tmp_path / "no" / "such" / "out").code == INPUT_NOT_FOUND


def test_full_disk_is_seen_before_anything_is_written(tmp_path, original, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=12345))
    error = refusal(original, tmp_path / "out")
    assert error.code == IO_ERROR
    assert "12345 free" in str(error)
    assert names_in(tmp_path) == []


def interrupt_after(monkeypatch, num_leaves: int, error: BaseException) -> list[str]:
    """Makes the writing of the leaf after so many raise; gives the leaves that were written."""
    written: list[str] = []
    write_leaf = orbax.write_leaf

    def write(folder, leaf, value):
        if len(written) == num_leaves:
            raise error
        write_leaf(folder, leaf, value)
        written.append(leaf)

    monkeypatch.setattr(orbax, "write_leaf", write)
    return written


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_interrupted_conversion_resumes_and_redoes_nothing(
    tmp_path, config, tensors, original, monkeypatch, error
):
    with monkeypatch.context() as patch:
        written = interrupt_after(patch, 7, error)
        with pytest.raises((KeyboardInterrupt, MixtralError)) as caught:
            convert(original, tmp_path / "out")
        if isinstance(error, OSError):
            assert isinstance(caught.value, MixtralError)
            assert caught.value.code == IO_ERROR
            assert "resume" in str(caught.value)
    assert names_in(tmp_path) == ["out.partial"]
    with monkeypatch.context() as patch:
        rest = interrupt_after(patch, 10**9, KeyboardInterrupt())
        convert(original, tmp_path / "out")
    assert len(written) == 7
    assert sorted(written + rest) == sorted(leaf_specs(config))
    assert_same(stored(tmp_path / "out"), checkpoints.leaves(tensors, config))
    assert names_in(tmp_path) == ["out"]


def test_stop_is_asked_before_each_leaf(tmp_path, original, config):
    asked = iter([False, False, True])
    with pytest.raises(MixtralError, match="interrupted") as caught:
        convert(original, tmp_path / "out", stop=lambda: next(asked))
    assert caught.value.code == INTERRUPTED
    assert len(names_in(tmp_path / "out.partial" / "output" / "weights")) == 2
    assert convert(original, tmp_path / "out").tensors == len(leaf_specs(config))


@pytest.fixture
def unfinished(tmp_path, original, monkeypatch) -> Path:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            convert(original, tmp_path / "out")
    return tmp_path / "out.partial"


def test_torn_journal_and_half_written_leaf_are_redone(
    tmp_path, config, tensors, original, unfinished
):
    journal = unfinished / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    leaf = json.loads(lines[-1])["leaf"]
    # The leaf is complete on disk, its line is torn; another has a stale temporary folder.
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    weights = unfinished / "output" / "weights"
    (weights / f"{leaf}.orbax-checkpoint-tmp").mkdir()
    next((weights / leaf / "state" / leaf).glob("0*")).write_bytes(b"half")
    convert(original, tmp_path / "out")
    assert_same(stored(tmp_path / "out"), checkpoints.leaves(tensors, config))
    assert sorted(names_in(tmp_path / "out" / "weights")) == sorted(leaf_specs(config))


def test_finished_leaf_that_was_damaged_meanwhile_is_redone(
    tmp_path, config, tensors, original, unfinished
):
    leaf = json.loads((unfinished / "journal.jsonl").read_bytes().splitlines()[-1])["leaf"]
    shutil.rmtree(unfinished / "output" / "weights" / leaf)
    convert(original, tmp_path / "out")
    assert_same(stored(tmp_path / "out"), checkpoints.leaves(tensors, config))


def test_work_folder_of_another_conversion_is_refused(tmp_path, config, unfinished, original):
    error = refusal(original, tmp_path / "out", ConvertOptions(dtype="float32"))
    assert error.code == OUTPUT_EXISTS
    assert f"delete {unfinished}" in str(error)
    other = checkpoints.write(tmp_path / "hf", config, checkpoints.random_tensors(config, seed=1))
    os.rename(other / "model.safetensors", other / "m.safetensors")
    index = {"weight_map": dict.fromkeys(checkpoints.random_tensors(config), "m.safetensors")}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(other, tmp_path / "out").code == OUTPUT_EXISTS


def test_two_conversions_at_once_are_refused(tmp_path, original, monkeypatch):
    errors = []
    write_leaf = orbax.write_leaf

    def write(folder, leaf, value):
        if not errors:
            errors.append(refusal(original, tmp_path / "out"))
        write_leaf(folder, leaf, value)

    monkeypatch.setattr(orbax, "write_leaf", write)
    convert(original, tmp_path / "out")
    assert errors[0].code == OUTPUT_EXISTS
    assert "another conversion" in str(errors[0])


def test_verify_notices_what_the_disk_changed(tmp_path, original, monkeypatch):
    write_leaf = orbax.write_leaf

    def write(folder, leaf, value):
        value = value.copy()
        if leaf == "norm.weight":
            value.view(np.uint16)[3] ^= 1
        write_leaf(folder, leaf, value)

    monkeypatch.setattr(orbax, "write_leaf", write)
    error = refusal(original, tmp_path / "out", ConvertOptions(verify=True))
    assert error.code == IO_ERROR
    assert "norm.weight" in str(error)
