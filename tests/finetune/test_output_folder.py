"""OUTPUT_DIR is ours, and of one run at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_jax.errors import OUTPUT_EXISTS, MixtralError
from mixtral_jax.finetune.options import FinetuneOptions
from mixtral_jax.finetune.output_folder import MARK, OutputFolder

OPTIONS = FinetuneOptions(dataset=("a.jsonl",), output_dir=Path("out"))


def refused(path: Path, words: str) -> None:
    with pytest.raises(MixtralError, match=words) as caught, OutputFolder(path, OPTIONS):
        pass
    assert caught.value.code == OUTPUT_EXISTS


def test_it_is_made_marked_and_taken_again(tmp_path):
    path = tmp_path / "a" / "out"
    with OutputFolder(path, OPTIONS) as folder:
        assert not (path / MARK).exists()
        folder.mark()
        assert json.loads((path / MARK).read_text())["dataset"] == ["a.jsonl"]
        refused(path, "in use by another run")
    with OutputFolder(path, OPTIONS):
        pass


def test_folders_and_files_of_others_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    refused(tmp_path, "holds files")
    refused(tmp_path / "mine.txt", "is a file")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_process_that_died_holds_nothing(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path;"
        "from mixtral_jax.finetune.output_folder import OutputFolder;"
        "from mixtral_jax.finetune.options import FinetuneOptions as O;"
        "path = Path(sys.argv[1]);"
        "OutputFolder(path, O(dataset=('a',), output_dir=path)).__enter__().mark();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    path = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", program, str(path)], cwd=root, check=False)
    assert killed.returncode == -9
    with OutputFolder(path, OPTIONS):
        pass
