"""The files that the embedded model is evaluated with."""

from __future__ import annotations

import json

from examples.tiny.data import CALIBRATION, QUESTIONS, TEXT, Options, main
from examples.tiny.families import FAMILIES
from examples.tiny.language import CODES
from examples.tiny.text import held_out, normalised
from mixtral_jax import cli
from mixtral_jax.evaluate.exact import read_questions


def run(folder, *arguments: str) -> int:
    given = [str(folder), "--per-family", "2", "--lines", "30", "--conversations", "12"]
    given += ["--per-group", "3", *arguments]
    return cli.run(main, Options, "data", given)


def test_files(tmp_path, capsys):
    assert run(tmp_path / "a") == run(tmp_path / "b") == 0
    for name in (QUESTIONS, TEXT, CALIBRATION):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    questions = read_questions(tmp_path / "a" / QUESTIONS)
    wanted = [(example.prompt, example.answer) for example in held_out(2, seed=0)]
    assert [(question.prompt, question.answer) for question in questions] == wanted
    assert len((tmp_path / "a" / TEXT).read_text(encoding="utf-8").splitlines()) == 30
    rows = [json.loads(x) for x in (tmp_path / "a" / CALIBRATION).read_text("utf-8").splitlines()]
    talks = [row["messages"] for row in rows if "messages" in row]
    asked = {normalised(m["content"]) for talk in talks for m in talk if m["role"] == "user"}
    assert (len(talks), len(rows)) == (12, 15)
    assert not asked & {normalised(prompt) for prompt, _ in wanted}, "held out from training"
    assert len(list((tmp_path / "a").glob("language-*.jsonl"))) == len(CODES)
    for name in FAMILIES:
        rows = (tmp_path / "a" / f"family-{name}.jsonl").read_text("utf-8").splitlines()
        talks = [json.loads(row)["messages"] for row in rows]
        assert [[m["role"] for m in talk] for talk in talks] == [["user", "assistant"]] * 3
        asked |= {normalised(talk[0]["content"]) for talk in talks}
    assert not asked & {normalised(prompt) for prompt, _ in wanted}, "held out from training"
    capsys.readouterr()
    assert run(tmp_path / "a") == 73
    assert "exists; fix: name another folder" in capsys.readouterr().err
    assert run(tmp_path / "c", "--seed", "1") == 0
    assert (tmp_path / "c" / TEXT).read_bytes() != (tmp_path / "a" / TEXT).read_bytes()


def test_no_lines_are_refused(tmp_path, capsys):
    assert cli.run(main, Options, "data", [str(tmp_path), "--lines", "0"]) == 64
    assert "--lines" in capsys.readouterr().err
