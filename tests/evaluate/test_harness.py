"""What lm-eval asks of our class, and how its command line is called; numbers: tests/parity."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_jax import language_model
from mixtral_jax.config import PRESETS
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.evaluate import harness
from mixtral_jax.evaluate.likelihood import Likelihood, Likelihoods
from mixtral_jax.language_model import EMBEDDED_FOLDER, LanguageModel
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.tokenizer import Tokenizer
from tests.models import REFERENCE, random_model

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.parity  # which has lm-eval
module: Any = importlib.import_module("mixtral_jax.evaluate.harness_model")
CONFIG = dataclasses.replace(PRESETS["tiny"], num_hidden_layers=1)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    tokenizer = Tokenizer.from_folder(EMBEDDED_FOLDER)
    return LanguageModel(
        random_model(CONFIG), tokenizer=tokenizer, placement=REFERENCE, spec=MeshSpec()
    )


@pytest.fixture
def seen(lm, monkeypatch) -> list[Any]:
    """What models are asked: options of load, then windows and rows of tokens."""
    asked: list[Any] = []

    def load(checkpoint: str, *, note: Any, **options: Any) -> LanguageModel:
        asked.append(options)
        return lm

    def likelihoods(lm: LanguageModel, cut: Any, **how: Any) -> Likelihoods:
        asked.extend(cut)
        return Likelihoods([Likelihood(-1.0, False)] * len(cut), 3 * len(cut))

    def batch(self: LanguageModel, rows: Any, *how: Any, **more: Any) -> Any:
        asked.extend(rows)
        return rows

    def complete(self: LanguageModel, rows: Any) -> list[Any]:
        return [SimpleNamespace(error=None, generated_text="x", dropped=7) for _ in rows]

    monkeypatch.setattr(language_model, "load", load)
    monkeypatch.setattr(module, "likelihoods", likelihoods)
    monkeypatch.setattr(LanguageModel, "batch", batch)
    monkeypatch.setattr(LanguageModel, "complete", complete)
    return asked


def requests(*pairs: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


@pytest.mark.parametrize("pair", [("Paris", ""), ("", ""), ("Montag", "e"), ("▁", "")], ids=repr)
def test_nothing_to_score_is_no_perfect_score(seen, lm, pair):
    model = module.HarnessModel()
    if pair == ("Montag", "e"):  # any two texts that are fewer tokens together
        pieces = {*lm.tokenizer.pieces}
        long = next(p for p in sorted(pieces) if p.startswith("▁") and len(p) > 3)[1:]
        pair = next((long[:i], long[i:]) for i in range(1, len(long)))
    whole, context = (lm.tokenizer.encode(text) for text in ("".join(pair), pair[0]))
    assert len(whole) <= len(context), "the test's own premise"
    with pytest.raises(MixtralError, match="nothing to score") as caught:
        model.loglikelihood(requests(("a", " b"), pair), disable_tqdm=True)
    assert caught.value.code == BAD_DATA
    assert pair[0] in str(caught.value)


@pytest.mark.parametrize("add_bos_token", [True, False])
@pytest.mark.parametrize("context", ["", " ", "  \n"])
def test_an_empty_context_is_the_prefix_token(seen, lm, context, add_bos_token):
    model = module.HarnessModel(add_bos_token=add_bos_token)
    found = model.loglikelihood(requests((context, "Montag ist gut")), disable_tqdm=True)
    assert found == [(-1.0, False)]
    window = seen[-1]
    assert window.token_ids[0] == lm.tokenizer.bos_id
    assert window.first == window.begin + 1
    model.generate_until(requests(("", {"until": [], "max_gen_toks": 4})), disable_tqdm=True)
    assert seen[-1] == [lm.tokenizer.bos_id]


def test_dropped_assignments_are_told(seen, capsys):
    model = module.HarnessModel()
    model.loglikelihood(requests(("a", " b"), ("c", " d")), disable_tqdm=True)
    assert "note: scoring: dropped 6 expert assignments" in capsys.readouterr().err
    kwargs = {"until": [], "max_gen_toks": 4}
    model.generate_until(requests(("a", kwargs), ("b", kwargs)), disable_tqdm=True)
    assert "note: writing: dropped 7 expert assignments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_length": "abc"}, "--model_args max_length: expected a number, got 'abc'"),
        ({"max_gen_toks": -1}, "--model_args max_gen_toks: expected a number, got -1"),
        ({"seed": 1.5}, "--model_args seed: expected a number, got 1.5"),
        ({"add_bos_token": "no"}, "add_bos_token: expected True or False, got 'no'"),
        ({"offload": "experts"}, "lm-eval does not run with --offload"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_before_loading(seen, options, line):
    with pytest.raises(MixtralError) as caught:
        module.HarnessModel(**options)
    assert caught.value.code == USAGE
    assert line in str(caught.value)
    assert seen == []


def test_options_that_lm_eval_reads_as_numbers_are_texts(seen):
    assert module.HarnessModel(mesh=4, max_length="8").max_length == 8
    assert seen == [{"mesh": "4"}]


def test_the_advice_about_lengths_can_be_followed(seen):
    model = module.HarnessModel(max_length=8)
    kwargs = {"until": [], "max_gen_toks": 8}
    with pytest.raises(MixtralError, match=r"max_gen_toks=4$"):
        model.generate_until(requests(("a", kwargs)), disable_tqdm=True)
    model.generate_until(requests(("a", kwargs | {"max_gen_toks": 4})), disable_tqdm=True)


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The command line that lm-eval gets."""
    words: list[str] = []
    monkeypatch.setattr(
        importlib.import_module("lm_eval.__main__"),
        "cli_evaluate",
        lambda: words.extend(sys.argv[1:]),
    )
    return words


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "argv", ["lm-eval", *words])
    return importlib.import_module("lm_eval._cli").HarnessCLI().parse_args()


@pytest.mark.parametrize(
    ("words", "model"),
    [
        ("--tasks a b", "mixtral_jax"),
        ("run --tasks a", "mixtral_jax"),
        ("run --model hf --tasks a", "hf"),
        ("run -Mhf --tasks a", "hf"),
        ("--tasks a --model=hf", "hf"),
        ("run --config PLAIN", "mixtral_jax"),
        ("run --config=PLAIN --tasks a", "mixtral_jax"),
        ("run -CPLAIN", "mixtral_jax"),
        ("run --config NAMED", None),
        ("run -CNAMED", None),
    ],
)
def test_another_model_runs_only_where_it_is_named(words, model, called, tmp_path, monkeypatch):
    (tmp_path / "named.yaml").write_text("model: hf\ntasks: [a]\n")
    (tmp_path / "plain.yaml").write_text("tasks: [a]\n")
    for name in ("named", "plain"):
        words = words.replace(name.upper(), str(tmp_path / f"{name}.yaml"))
    harness.run(words.split())
    assert parsed(called, monkeypatch).model == model


@pytest.mark.parametrize("words", ["", "run", "ls tasks", "validate --tasks a"])
def test_other_commands_are_left_alone(words, called):
    harness.run(words.split())
    assert called == words.split()


@pytest.mark.parametrize("word", ["--mod", "--conf"])
def test_abbreviations_of_what_names_a_model_are_refused(word, capsys):
    with pytest.raises(MixtralError, match="lm-eval stopped"):
        harness.run(["run", word, "hf"])
    assert "ambiguous option" in capsys.readouterr().err


def test_files_of_options_that_cannot_be_read(called, tmp_path: Path):
    (tmp_path / "list.yaml").write_text("[a]")
    with pytest.raises(MixtralError, match="--config: YAML root must be a mapping") as caught:
        harness.run(["run", "--config", str(tmp_path / "list.yaml")])
    assert caught.value.code == BAD_DATA
    with pytest.raises(MixtralError, match="no file") as caught:
        harness.run(["run", "--config", str(tmp_path / "none.yaml")])
    assert caught.value.code == INPUT_NOT_FOUND
    assert called == []


def test_what_lm_eval_refuses_is_usage(monkeypatch, tmp_path):
    command = importlib.import_module("lm_eval.__main__")
    config = importlib.import_module("lm_eval.config.evaluate_config").EvaluatorConfig

    def refuse() -> None:
        config.load_yaml_config(bad)

    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    monkeypatch.setattr(command, "cli_evaluate", refuse)
    with pytest.raises(MixtralError, match="lm-eval: Invalid YAML") as caught:
        harness.run(["--tasks", "a"])
    assert caught.value.code == USAGE
    assert "\n" not in str(caught.value)


def test_what_we_raise_is_not_blamed_on_lm_eval(monkeypatch):
    def fail() -> None:
        raise ValueError("ours")

    monkeypatch.setattr(importlib.import_module("lm_eval.__main__"), "cli_evaluate", fail)
    with pytest.raises(ValueError, match=r"^ours$"):
        harness.run(["--tasks", "a"])
