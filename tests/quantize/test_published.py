"""Quantizing to the published layout: what is ours is removed, and nothing is made twice."""

from __future__ import annotations

import itertools
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.errors import OUTPUT_EXISTS, MixtralError
from mixtral_jax.quantize import published as made
from mixtral_jax.quantize.driver import QuantizeReport, quantize_checkpoint
from mixtral_jax.quantize.makers import Recipe
from tests.convert import checkpoints
from tests.kills import run_killed
from tests.slow import mostly_slow

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(scheme="int4", group_size=32)
HOME = "mixtral_jax.quantize.published"


@pytest.fixture
def small(tmp_path, small_config) -> Path:
    config = small_config(hidden_size=64, head_dim=16, num_hidden_layers=1, num_local_experts=2)
    return checkpoints.write(tmp_path / "hf", config, checkpoints.random_tensors(config))


def publish(src: Path, dst: Path) -> tuple[QuantizeReport, list[str]]:
    """The report, and the notes of quantizing."""
    notes: list[str] = []

    def quantize(folder: Path) -> QuantizeReport:
        return quantize_checkpoint(src, folder, RECIPE, note=notes.append)

    return made.published(dst, quantize), notes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_of_the_same_options_is_left_alone(tmp_path, small):
    """Whatever it is called: it may be what somebody wanted."""
    theirs = [tmp_path / name for name in ("q.quantized", "q.partial", ".q.codes")]
    for folder in theirs:
        quantize_checkpoint(small, folder, RECIPE)
    report, _ = publish(small, tmp_path / "q")
    assert names(tmp_path) == sorted(["hf", "q", *(folder.name for folder in theirs)])
    assert all(read_manifest(folder).digest == report.converted.digest for folder in theirs)


@pytest.mark.parametrize("kind", ["file in it", "file", "link"])
def test_a_work_folder_of_somebody_else_is_refused(tmp_path, small, kind):
    work, other = tmp_path / ".q.quantizing", tmp_path / "other"
    if kind == "link":
        other.mkdir()
        work.symlink_to(other)
    elif kind == "file":
        work.touch()
    else:
        work.mkdir()
        (work / "thesis.txt").touch()
    with pytest.raises(MixtralError, match=r"\.q\.quantizing is in the way") as error:
        publish(small, tmp_path / "q")
    assert error.value.code == OUTPUT_EXISTS
    assert work.exists()
    assert kind != "file in it" or names(work) == ["thesis.txt"]
    assert not (tmp_path / "q").exists()


class Killed(BaseException):
    """Instead of the signal: what tidies up after an error has nothing to tidy here."""


def killed_at(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, until it is called so many times."""
    calls = itertools.count(1)

    def calling(*arguments, **fields):
        if next(calls) == count:
            raise Killed
        return function(*arguments, **fields)

    return calling


STEPS = [("convert", 1), ("sync_folder", 1), ("sync_folder", 2)]


@pytest.mark.parametrize("step", mostly_slow(STEPS, STEPS[1:2]))
def test_the_same_call_resumes(tmp_path, small, monkeypatch, step):
    """After each of its steps; what is quantized is not quantized again."""
    name, count = step
    dst = tmp_path / "q"
    dst.mkdir()  # empty: as good as absent
    with monkeypatch.context() as patch:
        patch.setattr(made, name, killed_at(count, getattr(made, name)))
        with pytest.raises(Killed):
            publish(small, dst)
    assert names(tmp_path)[0] == ".q.quantizing"
    report, notes = publish(small, dst)
    assert "is complete already" in notes[-1]
    assert names(tmp_path) == ["hf", "q"]
    again, _ = publish(small, tmp_path / "again")
    assert again.converted.digest == report.converted.digest
    assert again.coverage == report.coverage
    for file in ("config.json", "model.safetensors"):
        assert (dst / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_destination_that_another_made_meanwhile_is_refused(tmp_path, small, monkeypatch):
    """It is not what was written here, though the work is there and whole."""
    with monkeypatch.context() as patch:
        patch.setattr(made, "sync_folder", killed_at(1, made.sync_folder))
        with pytest.raises(Killed):
            publish(small, tmp_path / "q")
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "file").touch()
    with pytest.raises(MixtralError, match="exists and is not empty") as error:
        publish(small, tmp_path / "q")
    assert error.value.code == OUTPUT_EXISTS
    assert names(tmp_path / "q") == ["file"]
    assert "codes" in names(tmp_path / ".q.quantizing")


def test_a_kill_while_the_work_is_removed_leaves_a_finished_folder(tmp_path, small, monkeypatch):
    """It was written; the next call says so, and removes the rest."""
    remove = shutil.rmtree

    def killed(path: Path, **fields: Any) -> None:
        if path.name == ".q.quantizing.removed" and path.exists():
            raise Killed
        remove(path, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            publish(small, tmp_path / "q")
    assert names(tmp_path) == [".q.quantizing.removed", "hf", "q"]
    with pytest.raises(MixtralError, match="exists and is not empty"):
        publish(small, tmp_path / "q")
    assert names(tmp_path) == ["hf", "q"]


KILLED = """
from pathlib import Path
from mixtral_jax.quantize.options import Options, quantize
begin()
options = {"scheme": "int4", "group_size": 32, "format": "gptq"}
quantize(Options(src=sys.argv[1], dst=Path(sys.argv[2]), **options))
print(events)
"""


@pytest.mark.fault
def test_many_kills_and_reruns_give_the_same_files(tmp_path, small):
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    whole = run_killed(KILLED, -1, small, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    events = int(whole.stdout)
    for k in range(6):
        dst = tmp_path / f"q{k}"
        for _ in range(4):
            done = run_killed(KILLED, draw.randrange(events // 4, events), small, dst)
            if done.returncode != -signal.SIGKILL:
                break
        else:
            done = run_killed(KILLED, -1, small, dst)
        # A kill while the work was removed: the folder was finished.
        is_told = f"{dst.name} exists and is not empty" in done.stderr
        assert done.returncode == 0 or is_told, (seed, k, done.stderr)
        assert names(tmp_path) == sorted(["hf", "whole", *(f"q{i}" for i in range(k + 1))]), seed
        assert names(dst) == names(tmp_path / "whole"), (seed, k)
        for file in names(dst):
            found, expected = ((folder / file).read_bytes() for folder in (dst, tmp_path / "whole"))
            assert found == expected, (seed, k, file)
