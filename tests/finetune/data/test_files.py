"""Which files a name means, and rows with the place they come from."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.finetune.data.files import Row, find_files, read_rows

HUB_SHARD = "{}-0000{}-of-00002-a3ecf92756993583.parquet"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n", encoding="utf-8")


def found(*names: str | Path) -> list[str]:
    return [str(path) for path in find_files(names)]


def refusal(*names: str) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        find_files(names)
    return caught.value


@pytest.mark.usefixtures("folder")
def test_names_folders_and_patterns():
    touch("a.txt", "d/2.jsonl", "d/1.jsonl", "d/deep/3.parquet", "d/notes.md", "d/.cache/4.jsonl")
    assert found("a.txt") == ["a.txt"]  # a name may end in anything
    assert found("d") == ["d/1.jsonl", "d/2.jsonl", "d/deep/3.parquet"]
    assert found("d/*.jsonl") == ["d/1.jsonl", "d/2.jsonl"]
    assert found("d/**/*.parquet") == ["d/deep/3.parquet"]
    assert found("d/2.jsonl", "d", Path("d/1.jsonl")) == ["d/2.jsonl", "d/1.jsonl", *found("d")[2:]]


@pytest.mark.usefixtures("folder")
def test_the_log_of_a_run_among_the_data_is_no_data():
    touch("d/1.jsonl", "d/out/finetune.json", "d/out/metrics.jsonl")
    assert found("d") == found("d/**/*.jsonl") == ["d/1.jsonl"]
    assert found("d/out/metrics.jsonl") == ["d/out/metrics.jsonl"]  # asked for by its name


@pytest.mark.usefixtures("folder")
def test_a_file_under_two_names_is_read_once():
    touch("a.jsonl")
    os.symlink("a.jsonl", "b.jsonl")
    assert found("a.jsonl", "./a.jsonl", "b.jsonl") == ["a.jsonl"]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("name", ["none.jsonl", "empty", "none/*.jsonl", "none"])
def test_nothing_found_names_what_was_asked(name: str):
    Path("empty").mkdir()
    error = refusal(name)
    assert error.code == INPUT_NOT_FOUND
    assert f"dataset {name}: expected data files" in str(error)
    assert "fix: " in str(error)


SPLITS = [
    ([HUB_SHARD.format("data/train_sft", 0), HUB_SHARD.format("data/test_sft", 0)], True),
    ([HUB_SHARD.format("data/train_sft", 0), HUB_SHARD.format("data/train_gen", 1)], True),
    ([HUB_SHARD.format("data/train_sft", 0), HUB_SHARD.format("data/train_sft", 1)], False),
    (["data/train.jsonl", "data/validation.jsonl"], True),
    (["data/train-1.jsonl", "data/Train_2.jsonl"], False),
    (["data/train/0.parquet", "data/test/0.parquet"], True),
    (["data/trains.jsonl", "data/testament.jsonl", "data/evaluation.jsonl"], False),
    (["data/test_run/train.jsonl", "data/test_run/more.jsonl"], False),
]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("names", "is_mixed"), SPLITS)
@pytest.mark.parametrize("asked", ["data", "data/**/*.*"])
def test_splits_are_not_mixed(names: list[str], is_mixed: bool, asked: str):
    touch(*names)
    assert sorted(found(*names)) == sorted(names)  # who names them has chosen
    if not is_mixed:
        assert found(asked) == sorted(names)
        return
    error = refusal(asked)
    assert error.code == USAGE
    assert "expected files of one split, got " in str(error)
    assert "train" in str(error)


def rows(path: Path, *columns: str) -> list[Row]:
    return list(read_rows(path, columns))


def test_lines_are_counted_as_editors_do(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "\xc3\xa9"}\n\n  \r\n{"text": "b"}\r\n{"text": "c"}')
    read = rows(path)
    assert [row.where for row in read] == [f"{path} line {n}" for n in (1, 4, 5)]
    assert [row.columns()["text"] for row in read] == ["é", "b", "c"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"nonsense", "Expecting value (character 1)"),
        (b'{"text": "cut', "Unterminated string starting at (character 10)"),
        (b'{"a": 1} {"a": 2}', "Extra data (character 10)"),
        (b'{"text": "\xff"}', "invalid start byte (byte 11)"),
        (b"[1, 2]", "got a list"),
        (b'"text"', "got a str"),
        (b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer string conversion"),
    ],
)
def test_a_line_that_is_no_object(tmp_path: Path, line: bytes, told: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(line + b"\n")
    (row,) = rows(path)
    with pytest.raises(MixtralError, match="expected a JSON object") as caught:
        row.columns()
    assert caught.value.code == BAD_DATA
    assert told in str(caught.value)


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.data"])
def test_parquet_is_known_by_its_content(tmp_path: Path, name: str):
    messages = [[{"role": "user", "content": f"{i}"}] for i in range(5)]
    path = write_parquet(tmp_path / name, {"messages": messages, "score": [0.5] * 5})
    read = rows(path, "messages", "text")
    assert [row.where for row in read] == [f"{path} row {n}" for n in range(1, 6)]
    assert [row.columns() for row in read] == [{"messages": one} for one in messages]


def test_without_a_wanted_column_all_are_told(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"question": ["a"], "response": ["b"]})
    assert rows(path, "text")[0].columns() == {"question": "a", "response": "b"}


def test_damaged_parquet_is_named(tmp_path: Path):
    path = write_parquet(tmp_path / "a.parquet", {"text": [f"text {i}" * 50 for i in range(900)]})
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"version https://git-lfs.github.com/spec/v1\n", b""):
        path.write_bytes(damaged)
        with pytest.raises(MixtralError, match="expected a Parquet file") as caught:
            rows(path, "text")
        assert caught.value.code == BAD_DATA
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    assert len(rows(path, "text")) == 900


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MixtralError) as caught:
        rows(path, "text")
    assert caught.value.code == BAD_CONFIG
    line = f"{path}: Parquet files need pyarrow; fix: pip install 'mixtral-jax[finetune]'"
    assert str(caught.value) == line
