"""The record of the embedded model: the logs of its runs as one curve."""

from __future__ import annotations

import json

from examples.tiny import record
from mixtral_jax import cli


def log(folder, lines: list[dict]) -> None:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def line(step: int, loss: float, **more) -> dict:
    load = [[0.5, 0.5], [0.75, 0.25]]
    return {"step": step, "loss": loss, "mean_token_accuracy": 0.5, "expert_load": load, **more}


def test_the_curve_is_that_of_all_runs(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    log(
        one,
        [line(50, 3.0, seconds=10.0), line(100, 2.0, seconds=5.0), {"step": 100, "samples": []}],
    )
    log(two, [line(10, 1.0, seconds=2.5)])
    curve = record.curve_of([one, two])
    assert [(point["step"], point["seconds"], point["loss"]) for point in curve] == [
        (50, 10.0, 3.0),
        (100, 15.0, 2.0),
        (110, 17.5, 1.0),
    ]
    assert {point["least_expert_load"] for point in curve} == {0.25}


def test_options_of_the_runs_are_kept_without_names_of_files(tmp_path):
    options = {"model": "a", "output_dir": "b", "from_scratch": True, "train": {"seed": 0}}
    (tmp_path / "finetune.json").write_text(json.dumps(options))
    assert record.made_by([tmp_path])["runs"] == [{"from_scratch": True, "train": {"seed": 0}}]


def test_what_is_no_run_is_refused(tmp_path, capsys):
    argv = [str(tmp_path), str(tmp_path)]
    assert cli.run(record.main, record.Options, "record", argv) == 66
    assert "has no metrics.jsonl; fix: name" in capsys.readouterr().err
