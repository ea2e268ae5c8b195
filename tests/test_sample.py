"""The sample command: what scripts rely on, what is refused, and a conversation at a terminal."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mixtral_jax import cli, sample
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, INPUT_NOT_FOUND, OK, USAGE
from mixtral_jax.language_model import load

KEYS = {
    "prompt",
    "prompt_token_ids",
    "token_ids",
    "generated_text",
    "logprobs",
    "finish_reason",
    "dropped",
    "stats",
    "error",
}
STATS = {
    "prefill_seconds",
    "prefill_tokens_per_second",
    "decode_seconds",
    "decode_tokens_per_second",
    "compile_seconds",
}
ROOT = Path(__file__).parent.parent
SHORT = ("--max-new-tokens", "6", "--ignore-eos", "--mesh", "1x1")


def run(*argv: str) -> int:
    return cli.run(sample.main, sample.Options, "python -m mixtral_jax.sample", list(argv))


@pytest.fixture
def json_lines(capsys) -> Callable[..., list[dict]]:
    """Runs with --json; every line of stdout must be a sample."""

    def lines(*argv: str) -> list[dict]:
        assert run("--json", *SHORT, *argv) == OK
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return lines


def test_json_has_the_keys_that_scripts_rely_on(json_lines):
    (line,) = json_lines("--prompt", "the red house")
    assert line.keys() == KEYS
    assert line["stats"].keys() == STATS
    assert line["prompt"] == "the red house"
    assert line["prompt_token_ids"][0] == 1
    assert len(line["token_ids"]) == len(line["logprobs"]) == 6
    assert all(isinstance(i, int) for i in line["token_ids"])
    assert max(line["logprobs"]) <= 0
    assert isinstance(line["generated_text"], str)
    assert (line["finish_reason"], line["dropped"], line["error"]) == ("length", 0, None)
    assert all(isinstance(value, float) and value >= 0 for value in line["stats"].values())


def test_speculation_is_reported_where_it_was_asked_for(json_lines):
    (plain,) = json_lines("--prompt", "the red house")
    (line,) = json_lines("--prompt", "the red house", "--speculate", "2")
    assert line["token_ids"] == plain["token_ids"]
    report = line["stats"].pop("speculated")
    assert line["stats"].keys() == STATS
    assert report.keys() == {"drafted", "accepted", "row_steps", "switched_off"}
    assert report["accepted"] + report["row_steps"] == 6


def test_each_prompt_is_a_sample_of_its_own(json_lines):
    both = json_lines("--prompt", "the red house", "--prompt", "le jour")
    assert [line["prompt"] for line in both] == ["the red house", "le jour"]
    (alone,) = json_lines("--prompt", "le jour")
    assert alone["token_ids"] == both[1]["token_ids"] != both[0]["token_ids"]


def test_samples_and_options_arrive(json_lines):
    warm = ("--prompt", "le jour", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9")
    first, second = json_lines(*warm, "--num-samples", "2", "--seed", "4")
    assert first["token_ids"] != second["token_ids"]
    (other,) = json_lines(*warm, "--seed", "5")
    assert other["token_ids"] != first["token_ids"]
    assert json_lines(*warm, "--seed", "4")[0]["token_ids"] == first["token_ids"]


def test_prompt_ids_are_used_as_they_are(json_lines):
    (text,) = json_lines("--prompt", "the red house")
    ids = ",".join(map(str, text["prompt_token_ids"]))
    (line,) = json_lines("--prompt-ids", ids)
    assert line["prompt"] is None
    assert line["prompt_token_ids"] == text["prompt_token_ids"]
    assert line["token_ids"] == text["token_ids"]
    assert line["generated_text"] == text["generated_text"]


def test_an_adapter_is_put_on_top(json_lines, tmp_path):
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "o_proj"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    out, summed = load("tiny", mesh="1x1").model.layers[0].attention.o_proj[...].shape

    def ids(factor: float) -> list[int]:
        a, b = np.ones((2, summed), np.float32), np.ones((out, 2), np.float32)
        b[::2] *= -1
        factors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": factor * b}
        save_file(factors, tmp_path / "adapter_model.safetensors")
        argv = ("--prompt-ids", "1,300,301", "--temperature", "0", "--adapter", str(tmp_path))
        return json_lines(*argv)[0]["token_ids"]

    (plain,) = json_lines("--prompt-ids", "1,300,301", "--temperature", "0")
    assert ids(0) == plain["token_ids"]
    assert ids(4) != plain["token_ids"]


def test_a_stop_string_is_cut(json_lines):
    (whole,) = json_lines("--prompt", "the red house")
    stop = whole["generated_text"][2:4]
    (line,) = json_lines("--prompt", "the red house", "--stop", "never", "--stop", stop)
    assert line["generated_text"] == whole["generated_text"].partition(stop)[0]
    assert line["finish_reason"] == "stop_sequence"


def test_chat_makes_a_conversation_of_each_prompt(json_lines):
    asked = ("--chat", "--prompt", "jour", "--prompt", "nuit")
    first, second = json_lines(*asked)
    lm = load("tiny", mesh="1x1")
    assert lm.tokenizer is not None
    for line, content in ((first, "jour"), (second, "nuit")):
        assert line["prompt"] == content
        ids = lm.encode_chat([{"role": "user", "content": content}])
        assert line["prompt_token_ids"] == ids
        # An answer starts without the space of a continuation.
        assert line["generated_text"] == lm.tokenizer.decode(line["token_ids"])
    told = json_lines(*asked, "--system", "rouge")[0]
    messages = [{"role": "system", "content": "rouge"}, {"role": "user", "content": "jour"}]
    assert told["prompt_token_ids"] == lm.encode_chat(messages) != first["prompt_token_ids"]


def test_text_goes_to_stdout_and_notes_to_stderr(capsys):
    assert run("--prompt", "the red house", *SHORT) == OK
    captured = capsys.readouterr()
    assert captured.out.startswith("the red house")
    assert "note: 6 tokens, length: " in captured.err
    assert "tokens/s, prefill " in captured.err


def test_several_answers_have_one_summary_and_their_questions(capsys):
    argv = ("--chat", "--prompt", "12+30=", "--prompt", "7-3=", "--mesh", "1x1")
    assert run(*argv) == OK
    captured = capsys.readouterr()
    assert captured.out == "42\n4\n"
    assert [line for line in captured.err.splitlines() if line[0] == ">"] == ["> 12+30=", "> 7-3="]
    assert captured.err.count("note: ") == 1
    assert "2 eos_token" in captured.err


def test_the_demo_is_answered_right(capsys):
    """The command of `make demo`, word for word."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = [line for line in recipe.splitlines() if "mixtral_jax.sample" in line]
    assert run(*shlex.split(line.partition("mixtral_jax.sample")[2])) == OK
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "42",
        "La capitale de la France est Paris.",
        "3, 4, 5, 6, 7, 8, 9",
        "red",
        "martedì",
    ]
    assert "tokens/s" in captured.err
    assert "layer 3" in captured.err


def test_experts_are_drawn_beside_the_text(capsys):
    assert run("--prompt", "the red house", "--show-experts", *SHORT) == OK
    captured = capsys.readouterr()
    lines = captured.err.splitlines()[-5:]
    assert [line.split()[0] for line in lines] == ["expert", *["layer"] * 4]
    assert "layer" not in captured.out
    shares = [int(share) for share in re.findall(r"(\d+)%", lines[1])]
    assert len(shares) == 8
    assert sum(shares) == pytest.approx(100, abs=4)


def test_defaults_are_those_of_the_python_api():
    assert sample.Options().sampling == SamplingOptions()


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], USAGE, "expected one of --prompt, --prompt-ids and --interactive, got 0"),
        (["--prompt", "a", "--prompt-ids", "1"], USAGE, "got 2 of them"),
        (["--prompt", "a", "--interactive"], USAGE, "got 2 of them"),
        (["--promt", "a"], USAGE, "--promt, a; fix: --prompt"),
        (["--prompt", "a", "--no-such"], USAGE, "--no-such; fix: python -m"),
        (["--prompt", "a", "--temperature", "warm"], USAGE, "--temperature"),
        (["--prompt", "a", "--temperature", "-1"], USAGE, "--temperature: expected"),
        (["--prompt", "a", "--temperature", "nan"], USAGE, "--temperature: expected"),
        (["--prompt", "a", "--seed", str(2**32)], USAGE, "--seed: expected"),
        (["--prompt", "a", "--top-p", "0"], USAGE, "--top-p: expected"),
        (["--prompt", "a", "--max-new-tokens", "0"], USAGE, "--max-new-tokens: expected"),
        (["--prompt", "a", "--stop", ""], USAGE, "--stop: expected"),
        (["--prompt", "a", "--dtype", "int7"], USAGE, "int7"),
        (["--prompt", "a", "--mesh", "many"], USAGE, "--mesh: expected DATAxEXPERT"),
        (["--prompt", "a", "--mesh", "1x3"], BAD_CONFIG, "mesh 1x3: expected"),
        (["--prompt", "a", "--max-new-tokens", "2048"], USAGE, "within 2048, got"),
        (["--prompt-ids", "one"], USAGE, "--prompt-ids: expected 1,2,3"),
        (["--prompt-ids", ""], USAGE, "--prompt-ids: expected 1,2,3"),
        (["--prompt-ids", "1,2048"], BAD_DATA, "token id: expected 0 to 2047, got 2048"),
        (["--prompt-ids", "-1"], BAD_DATA, "token id: expected 0 to 2047, got -1"),
        (["--prompt-ids", "1", "--chat"], USAGE, "--chat needs text"),
        (["--prompt", "a", "--system", "b"], USAGE, "--system needs --chat"),
        (["--interactive", "--json"], USAGE, "--interactive prints text"),
        (["--interactive", "--show-experts"], USAGE, "neither --json nor --show-experts"),
        (["no-such-folder", "--prompt", "a"], INPUT_NOT_FOUND, "no-such-folder"),
        (["--prompt", "a", "--adapter", "nowhere"], INPUT_NOT_FOUND, "adapter nowhere: expected"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_refusals_are_one_line(argv, code, words, capsys):
    assert run(*argv) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
