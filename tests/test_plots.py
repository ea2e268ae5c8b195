"""Files that a command draws at its end: refused at its start, and written whole or not at all."""

from __future__ import annotations

import os

import pytest

from mixtral_jax.errors import INPUT_NOT_FOUND, IO_ERROR, OUTPUT_EXISTS, USAGE, MixtralError
from mixtral_jax.plots import check_file, figure_file, replacing


def test_names_that_cannot_be_written_are_refused_at_once(tmp_path, monkeypatch):
    def refusal(name: str) -> MixtralError:
        with pytest.raises(MixtralError) as caught:
            check_file("--plot", tmp_path / name, (".svg", ".png"))
        return caught.value

    (tmp_path / "folder.svg").mkdir()
    os.mkfifo(tmp_path / "pipe.svg")
    assert refusal("a.pdf").code == USAGE
    assert refusal("none/a.svg").code == INPUT_NOT_FOUND
    assert refusal("folder.svg").code == OUTPUT_EXISTS
    assert "folder.svg is a folder" in str(refusal("folder.svg"))
    assert refusal("pipe.svg").code == OUTPUT_EXISTS
    (tmp_path / "there.svg").touch()
    for name in ("new.svg", "there.svg", "new.PNG"):
        check_file("--plot", tmp_path / name, (".svg", ".png"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert refusal("new.svg").code == IO_ERROR
    assert "may not be written to" in str(refusal("new.svg"))


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def fail() -> None:
        with replacing(tmp_path / "a.txt") as partial:
            partial.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert (tmp_path / "a.txt").read_text() == "old"
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    with replacing(tmp_path / "link.txt") as partial:
        partial.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "link.txt"]


@pytest.mark.parametrize("name", ["a.svg", "a.PNG"])
def test_a_picture_is_drawn_whole_or_not(tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    with pytest.raises(RuntimeError), figure_file(path, size=(1, 1)):
        raise RuntimeError
    assert path.read_text() == "old"
    with figure_file(path, size=(1, 1)) as figure:
        figure.subplots(1, 1)
    assert path.read_bytes().startswith((b"<?xml", b"\x89PNG"))
    assert os.listdir(tmp_path) == [name]
