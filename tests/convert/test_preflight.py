"""Faults of places and rights are told before any work, and nothing of others is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixtral_jax.convert import convert
from mixtral_jax.errors import BAD_DATA, OUTPUT_EXISTS, MixtralError
from tests.convert import checkpoints


def refusal(src: Path, dst: Path) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        convert(src, dst)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ["thesis.txt", "output", "journal.jsonl"])
def test_work_folder_of_others_is_refused_and_left_alone(tmp_path, original, name):
    work = tmp_path / "out.partial"
    work.mkdir()
    (work / name).write_text("precious")
    error = refusal(original, tmp_path / "out")
    assert error.code == OUTPUT_EXISTS
    assert str(work) in str(error)
    assert (work / name).read_text() == "precious"
    assert os.listdir(work) == [name]


def test_empty_work_folder_is_used_and_removed(tmp_path, original):
    (tmp_path / "out.partial").mkdir()
    convert(original, tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_files_of_others_in_our_work_folder_outlive_it(tmp_path, original):
    with pytest.raises(MixtralError, match="interrupted"):
        convert(original, tmp_path / "out", stop=lambda: True)
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    for _ in range(2):  # the second finds the output complete
        convert(original, tmp_path / "out")
        assert os.listdir(tmp_path / "out.partial") == ["thesis.txt"]


def test_complete_output_beside_a_folder_of_others_leaves_it_alone(tmp_path, original):
    convert(original, tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    assert convert(original, tmp_path / "out").tensors
    assert os.listdir(tmp_path / "out.partial") == ["thesis.txt"]


@pytest.mark.parametrize("name", ["out", "out.partial"])
@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_destination_that_is_no_folder_is_refused(tmp_path, original, name, kind):
    path = tmp_path / name
    if kind == "file":
        path.write_text("precious")
    else:
        target = tmp_path / "elsewhere"
        path.symlink_to(target)
        if kind == "link":
            target.mkdir()
    before = sorted(os.listdir(tmp_path))
    error = refusal(original, tmp_path / "out")
    assert error.code == OUTPUT_EXISTS
    assert str(path) in str(error)
    assert sorted(os.listdir(tmp_path)) == before


def test_config_that_is_a_folder_is_bad_data(tmp_path, config, tensors):
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    (src / "config.json").unlink()
    (src / "config.json").mkdir()
    error = refusal(src, tmp_path / "out")
    assert error.code == BAD_DATA
    assert "config.json is a folder" in str(error)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "LICENSE", "my.model.v3"]
)
def test_link_that_leaves_the_checkpoint_is_refused_before_any_work(
    tmp_path, config, tensors, name
):
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    (tmp_path / "secret").write_text((src / "config.json").read_text())
    (src / name).unlink(missing_ok=True)
    (src / name).symlink_to(tmp_path / "secret")
    error = refusal(src, tmp_path / "out")
    assert error.code == BAD_DATA
    assert name in str(error)
    assert "leaves the checkpoint" in str(error)
    assert sorted(os.listdir(tmp_path)) == ["hf", "secret"]


def test_destination_inside_a_file_is_refused(tmp_path, original):
    (tmp_path / "file").write_text("precious")
    error = refusal(original, tmp_path / "file" / "out")
    assert error.code == OUTPUT_EXISTS
    assert f"{tmp_path / 'file'} is a file" in str(error)


def test_the_source_is_never_the_destination_nor_to_be_deleted(tmp_path, config, tensors):
    src = checkpoints.write(tmp_path / "hf", config, tensors)
    (tmp_path / "link").symlink_to(src)
    for dst in (src, src / "..", src.parent):
        error = refusal(src, dst)
        assert error.code == OUTPUT_EXISTS
        assert "delete" not in str(error)
    assert "is the source itself" in str(refusal(src, src))
    assert "is the source itself" in str(refusal(tmp_path / "link", src))
    assert sorted(os.listdir(src)) == ["config.json", "model.safetensors"]
