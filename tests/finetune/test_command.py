"""The command from data to result, on a small model with the embedded one's tokenizer."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from mixtral_jax import cli
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, INTERRUPTED, OK, OUTPUT_EXISTS, USAGE
from mixtral_jax.finetune.__main__ import _read_data, main, run
from mixtral_jax.finetune.config_file import arguments
from mixtral_jax.finetune.metrics import NAME, read_lines
from mixtral_jax.finetune.options import FinetuneOptions
from mixtral_jax.finetune.output_folder import MARK
from mixtral_jax.language_model import load
from mixtral_jax.sharding import hosts
from tests.finetune.fakes import log_of, signalled_at_step_three
from tests.finetune.models import make_folder

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_config):
    """A checkpoint and data."""
    folder = tmp_path_factory.mktemp("model")
    make_folder(folder, small_config, num_local_experts=2)
    return folder


def words(folder, out, *more: str) -> list[str]:
    options = "--max-length 16 --no-gradient-checkpointing --per-device-train-batch-size 2"
    options += " --report-to jsonl --logging-steps 1 --save-steps 2 --max-steps 4"
    options += " --use-peft --lora-r 4 --learning-rate 1e-2 --json"
    data = ["--dataset", str(folder / "chat.jsonl"), "--output-dir", str(out)]
    return [str(folder / "model"), *data, *options.split(), *more]


def command(*argv: str) -> int:
    """In this process, whose programs are compiled once."""
    return cli.run(main, FinetuneOptions, "finetune", arguments(argv), markers=())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder):
    """An adapter of four steps, which nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert command(*words(folder, out)) == OK
    return out


def tensors(out) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in load_file(out / ADAPTER).items()}


def test_it_leaves_an_adapter_that_loads(folder, whole):
    plain, adapted = load(folder / "model"), load(folder / "model", adapter=str(whole))
    tokens = [[1, 5, 6, 7]]
    assert np.abs(plain.logits(tokens) - adapted.logits(tokens)).max() > 1e-3
    lines = list(read_lines(whole / NAME))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_a_signal_and_the_same_command_again_make_the_same_adapter(tmp_path, folder, whole, capsys):
    with signalled_at_step_three():
        assert command(*words(folder, tmp_path / "out")) == INTERRUPTED
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    assert command(*words(folder, tmp_path / "out")) == OK
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["result"]) == (4, str(tmp_path / "out"))
    assert tensors(tmp_path / "out") == tensors(whole)
    assert log_of(tmp_path / "out") == log_of(whole)


def test_it_goes_on_from_an_adapter(tmp_path, folder, whole):
    """At a learning rate of nearly nothing the result is the adapter that it began with."""
    more = ["--adapter", str(whole), "--max-steps", "1", "--learning-rate", "1e-30"]
    assert command(*words(folder, tmp_path / "out", *more)) == OK
    before, after = (load_file(out / ADAPTER) for out in (whole, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=1e-20)
    assert command(*words(folder, tmp_path / "b", *more, "--lora-r", "8")) == BAD_DATA


def test_a_finished_command_writes_its_result_again(folder, whole, capsys):
    before = tensors(whole)
    (whole / ADAPTER).unlink()
    assert command(*words(folder, whole)) == OK
    assert tensors(whole) == before
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["loss"]) == (4, log_of(whole)[-1]["loss"])


def test_other_options_are_refused_by_name(folder, whole, capsys):
    asked = (whole / MARK).read_bytes()
    assert command(*words(folder, whole, "--learning-rate", "1e-3")) == BAD_DATA
    assert (whole / MARK).read_bytes() == asked
    assert "--learning-rate 0.01, got --learning-rate 0.001" in capsys.readouterr().err


def test_all_weights_train_and_load_with_evaluation_and_samples(tmp_path, folder):
    out = tmp_path / "out"
    chat = str(folder / "chat.jsonl")
    more = ["--no-use-peft", "--eval-dataset", chat, "--max-steps", "2"]
    more += ["--sample-prompts", "1+1=", "--sample-max-new-tokens", "4", "--router-aux-loss-coef=0"]
    assert command(*words(folder, out, *more)) == OK
    last = {name: value for line in read_lines(out / NAME) for name, value in line.items()}
    assert last["eval_perplexity"] == pytest.approx(np.exp(last["eval_loss"]))
    assert last["samples"][0]["prompt"] == "1+1="
    trained, before = load(out / "model"), load(folder / "model")
    leaves = zip(jax.tree.leaves(trained.model), jax.tree.leaves(before.model), strict=True)
    assert sum(not np.array_equal(a, b) for a, b in leaves) >= 10


def test_processes_agree_on_all_data_that_they_read(tmp_path, folder, monkeypatch):
    said: dict[str, str] = {}
    monkeypatch.setattr(hosts, "agree", lambda name, facts: said.update(facts()))
    data = folder / "chat.jsonl"
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().splitlines()[0])
    options = FinetuneOptions(
        dataset=(str(data),), eval_dataset=(str(other),), output_dir=tmp_path / "out"
    )
    found = _read_data(options, folder / "model")
    assert list(said.values()) == [each.digest for each in found if each]
    assert len(set(said.values())) == 2


def test_what_is_missing_or_not_ours_is_told(tmp_path, folder, capsys):
    data = ["--dataset", str(tmp_path / "none.jsonl"), "--output-dir", str(tmp_path / "a")]
    assert command(str(folder / "model"), *data, "--report-to", "none") == INPUT_NOT_FOUND
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").write_text("x")
    assert command(*words(folder, tmp_path / "b")) == OUTPUT_EXISTS
    assert run(["--config", "options.yaml"]) == USAGE
    err = capsys.readouterr().err
    assert err.count("error: ") == 3
    assert "Traceback" not in err
