"""What changes between two runs, or under way: nothing is mixed in silence."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest

from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.reader import INDEX_NAME
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, INTERRUPTED, MixtralError
from tests.convert import checkpoints
from tests.slow import mostly_slow

EMBEDDING = "model.embed_tokens.weight"
FORMATS = pytest.mark.parametrize("format", ["orbax", "safetensors"])


def fails(code: int, *arguments, **named) -> str:
    with pytest.raises(MixtralError) as caught:
        convert(*arguments, **named)
    assert caught.value.code == code, str(caught.value)
    return str(caught.value)


class Stop:
    """Does something before a leaf, or ends the run there."""

    def __init__(self, leaf: int, act=None):
        self.leaf, self.act, self.calls = leaf, act, 0

    def __call__(self) -> bool:
        self.calls += 1
        if self.calls == self.leaf and self.act is not None:
            self.act()
        return self.calls == self.leaf and self.act is None


@pytest.mark.parametrize("how", ["rewritten", "replaced"])
def test_a_source_that_changes_under_way_is_refused(tmp_path, small_config, how):
    config = small_config()
    src, other = (
        checkpoints.write(tmp_path / name, config, checkpoints.random_tensors(config, seed))
        for seed, name in enumerate(["src", "other"])
    )
    file, new = src / "model.safetensors", other / "model.safetensors"

    def act():
        if how == "rewritten":
            with open(file, "r+b") as handle:
                handle.write(new.read_bytes())
        else:
            new.rename(file)

    line = fails(BAD_DATA, src, tmp_path / "out", stop=Stop(6, act))
    assert "model.safetensors was changed while it was read" in line
    assert not (tmp_path / "out").exists()


@FORMATS
def test_nonfinite_values_are_kept_only_by_runs_that_were_told(tmp_path, small_config, format):
    config = small_config()
    tensors = checkpoints.random_tensors(config)
    tensors[EMBEDDING][0, 0] = np.nan
    src, out = checkpoints.write(tmp_path / "src", config, tensors), tmp_path / "out"
    keeping = ConvertOptions(format=format, allow_nonfinite=True)
    plain = ConvertOptions(format=format)
    fails(INTERRUPTED, src, out, keeping, stop=Stop(4))
    assert "has NaN or infinite values" in fails(BAD_DATA, src, out, plain)
    convert(src, out, keeping)
    assert "has NaN or infinite values" in fails(BAD_DATA, src, out, plain)
    convert(src, out, keeping)


@FORMATS
def test_a_finished_output_without_its_small_files_is_not_complete(tmp_path, small_config, format):
    config = small_config()
    src = checkpoints.write(tmp_path / "src", config, checkpoints.random_tensors(config))
    out, options = tmp_path / "out", ConvertOptions(format=format)
    convert(src, out, options)
    (out / "config.json").unlink()
    assert "config.json is missing" in fails(BAD_DATA, src, out, options)


@pytest.mark.parametrize("fault", ["missing", "empty", "extra"])
def test_a_finished_export_with_another_index_is_not_complete(tmp_path, small_config, fault):
    config = small_config()
    src = checkpoints.write(tmp_path / "src", config, checkpoints.random_tensors(config))
    size = None if fault == "extra" else "40KB"
    out, options = tmp_path / "out", ConvertOptions(format="safetensors", max_shard_size=size)
    convert(src, out, options)
    if fault == "missing":
        (out / INDEX_NAME).unlink()
    else:
        (out / INDEX_NAME).write_text("{}")
    assert INDEX_NAME in fails(BAD_DATA, src, out, options)


LINES = ['{"leaf": 1}', '{"leaf": "a", "shape": 3}', '{"x": 1}']


@pytest.mark.parametrize("line", mostly_slow(LINES, LINES[1:2]))
def test_a_damaged_journal_line_is_work_to_be_done_again(tmp_path, small_config, line):
    config = small_config()
    src = checkpoints.write(tmp_path / "src", config, checkpoints.random_tensors(config))
    fails(INTERRUPTED, src, tmp_path / "out", stop=Stop(4))
    journal = tmp_path / "out.partial" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:2], f"{line}\n", *lines[2:]]))
    digest = convert(src, tmp_path / "out").digest
    assert digest == convert(src, tmp_path / "again").digest


@pytest.mark.parametrize("name", ["\ud800.safetensors", "a" * 5000 + ".safetensors"])
def test_an_index_with_names_that_no_file_has(tmp_path, small_config, name):
    config = small_config()
    src = checkpoints.write(tmp_path / "src", config, checkpoints.random_tensors(config))
    (src / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    assert "which no file can be called" in fails(BAD_DATA, src, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("num_local_experts", 10**9), ("rope_theta", 10**400)],
)
def test_numbers_beyond_any_model(tmp_path, small_config, field, value):
    config = small_config()
    src = checkpoints.write(tmp_path / "src", config, checkpoints.random_tensors(config))
    fields = json.loads((src / "config.json").read_text())
    (src / "config.json").write_text(json.dumps({**fields, field: value}))
    assert field in fails(BAD_CONFIG, src, tmp_path / "out")


def test_killed_between_the_header_of_a_file_and_its_size_no_leaf_is_redone(tmp_path, original):
    options = ConvertOptions(format="safetensors")
    fails(INTERRUPTED, original, tmp_path / "out", options, stop=lambda: True)
    file = tmp_path / "out.partial" / "output" / "model.safetensors"
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    os.truncate(file, 8 + length)
    fails(INTERRUPTED, original, tmp_path / "out", options, stop=Stop(9))
    notes: list[str] = []
    convert(original, tmp_path / "out", options, note=notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("resuming: 8 of ")


@FORMATS
def test_what_a_fix_says_works_as_printed(tmp_path, small_config, format):
    """Data that other options would take, or that must be fetched again, leaves nothing behind."""
    config = small_config()
    tensors = checkpoints.random_tensors(config)
    tensors["lm_head.weight"][0, 0] = 1e6
    src, out = checkpoints.write(tmp_path / "src", config, tensors), tmp_path / "out"
    line = fails(BAD_DATA, src, out, ConvertOptions(format=format, dtype="float16"))
    assert "fix: choose --dtype bfloat16" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]
    convert(src, out, ConvertOptions(format=format, dtype="bfloat16"))


def test_a_window_that_is_not_followed_is_not_exported(tmp_path, small_config):
    config = small_config()
    src = checkpoints.write(tmp_path / "src", config, checkpoints.random_tensors(config))
    fields = json.loads((src / "config.json").read_text())
    for deliberate in (False, True):
        own = {"sliding_window_is_deliberate": True} if deliberate else {}
        changed = {**fields, "sliding_window": 4096, **own}
        (src / "config.json").write_text(json.dumps(changed))
        out = tmp_path / f"out-{deliberate}"
        convert(src, out, ConvertOptions(format="safetensors"))
        written = json.loads((out / "config.json").read_text())
        assert written == {**changed, "sliding_window": 4096 if deliberate else None}
