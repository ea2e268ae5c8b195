"""The file of --config gives what the command line does not."""

from __future__ import annotations

import json

import pytest
import tyro

from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.finetune.__main__ import run
from mixtral_jax.finetune.config_file import arguments
from mixtral_jax.finetune.options import FinetuneOptions

TOML = """
model = "folder"
output_dir = "from-file"
dataset = ["a.jsonl", "b.jsonl"]
json = true

[schedule]
learning-rate = 1e-4
max_steps = 7

[lora]
use_peft = true
lora_target_modules = ["w1", "w2"]
lora_dropout = 0.0
gradient_checkpointing = false
"""


def parse(argv: list[str]) -> FinetuneOptions:
    return tyro.cli(FinetuneOptions, args=arguments(argv))


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "options.toml"
    path.write_text(TOML)
    return path


def test_a_file_alone_is_enough(toml):
    found = parse(["--config", str(toml)])
    assert (found.model, found.dataset) == ("folder", ("a.jsonl", "b.jsonl"))
    assert (found.train.learning_rate, found.run.max_steps, found.json) == (1e-4, 7, True)
    assert found.train.lora_target_modules == ("w1", "w2")
    assert not found.train.gradient_checkpointing
    assert found.config == toml


@pytest.mark.parametrize("spelling", ["--config={}", "--config {}"])
def test_the_command_line_wins(toml, spelling):
    words = spelling.format(toml).split()
    words += ["--dataset", "c.jsonl", "--learning_rate=2e-4", "--no-use-peft"]
    found = parse(["other", *words, "--gradient-checkpointing", "--output-dir", "here"])
    assert (found.model, found.dataset) == ("other", ("c.jsonl",))
    assert (found.train.learning_rate, found.run.max_steps) == (2e-4, 7)
    assert (found.train.use_peft, found.train.gradient_checkpointing) == (False, True)
    assert str(found.output_dir) == "here"


def test_a_value_before_the_flags_of_the_file_is_no_model(toml):
    found = parse(["--max-steps", "9", "--config", str(toml), "--dataset", "c", "d"])
    assert (found.model, found.dataset, found.run.max_steps) == ("folder", ("c", "d"), 9)


def test_json_does_as_well(tmp_path, toml):
    path = tmp_path / "options.json"
    content = {"dataset": ["a"], "output_dir": "b", "lora": {"lora_r": 4}, "max_steps": None}
    path.write_text(json.dumps({**content, "json": False, "packing": False}))
    found = parse(["--config", str(path)])
    assert (found.train.lora_r, found.run.max_steps, found.json) == (4, None, False)


@pytest.mark.parametrize("word", ["--dataset_name=d", "--dataset-name", "--model_name_or_path"])
def test_an_option_of_trl_that_is_spelt_otherwise_here_is_named(word, capsys):
    assert run(["tiny", word, "x"]) == USAGE
    assert capsys.readouterr().err.startswith(f"error: {word} is an option of TRL; fix: ")


def test_without_a_file_the_command_line_stays_as_it_is():
    assert arguments(["m", "--json"]) == ["m", "--json"]


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("learning_rat = 1", BAD_CONFIG, "learning_rat is no option; fix: write learning_rate"),
        ("learning_rate = [1]", BAD_CONFIG, "expected one value"),
        ("use_peft = 1", BAD_CONFIG, "expected true or false"),
        ("dataset = 'a'", BAD_CONFIG, "expected a list"),
        ("lora_target_modules = []", BAD_CONFIG, "one at least, got "),
        ("sample_prompts = ['- one', 'two']", BAD_CONFIG, "do not begin with -"),
        ("dataset = ['a', 1]", BAD_CONFIG, "expected texts"),
        ("model = '-m'", BAD_CONFIG, "does not begin with -"),
        ("model = ['m']", BAD_CONFIG, "expected one value"),
        ("max_steps = true", BAD_CONFIG, "expected a value"),
        ("config = 'b.toml'", BAD_CONFIG, "command line alone"),
        ("seed = 1\n[a]\nseed = 2", BAD_CONFIG, "given twice"),
        ("seed = ", BAD_DATA, "unreadable TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(tmp_path, content, code, words):
    path = tmp_path / "options.toml"
    path.write_text(content)
    with pytest.raises(MixtralError, match=words) as caught:
        arguments(["--config", str(path)])
    assert caught.value.code == code
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_or_of_another_kind_is_told(tmp_path):
    for name, code in (("none.toml", INPUT_NOT_FOUND), ("a.yaml", USAGE)):
        with pytest.raises(MixtralError) as caught:
            arguments(["--config", str(tmp_path / name)])
        assert caught.value.code == code
