"""Every command of ours in the documentation parses, by its own parser: no option can rot."""

from __future__ import annotations

import contextlib
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import pytest
import tyro

from mixtral_jax.__main__ import main
from mixtral_jax.commands import VERBS
from mixtral_jax.errors import OK, USAGE
from mixtral_jax.serve.launcher import _ALIASES, REFUSED, WITHOUT_EFFECT
from tests.docs.blocks import PAGES, ROOT, Call, call_of, calls, codes

NOT_INSTALLED = ("torch", "transformers", "peft")  # of benchmarks; parsing needs none of them
CALLS = [call for page in PAGES for call in calls(page)]
EXAMPLES = [
    Call("commands.py", verb, tuple(shlex.split(each)))
    for verb, found in VERBS.items()
    for each in found.examples
]
RECIPES = [  # what a file of options under examples says of itself
    call
    for path in sorted(ROOT.glob("examples/*/*.toml"))
    for line in path.read_text("utf-8").splitlines()
    if line.startswith("# python") and (call := call_of(line, path.name))
]


@pytest.fixture
def parse(tmp_path, monkeypatch, capsys):
    """Parses a call as its command does, and does nothing else; gives the error, if any."""
    real = tyro.cli

    def only_parse(*args: Any, **how: Any) -> NoReturn:
        real(*args, **how)
        raise SystemExit(OK)  # before anything is done, whoever asked

    def parse(call: Call) -> str | None:
        code: int | str | None = OK
        try:
            if call.is_script:
                code = _script(call, monkeypatch)
            else:
                code = main([call.target, *call.words])
        except SystemExit as end:  # of --help, and of scripts
            code = end.code
        return None if code in (None, OK) else f"{code}: {capsys.readouterr().err}"

    monkeypatch.setattr(tyro, "cli", only_parse)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "docs").mkdir()  # where pictures go
    (tmp_path / "run.toml").write_text(option_file(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return parse


def option_file() -> str:
    """The file of options that docs/finetune.md shows: it has to be read, too."""
    shown = ["\n".join(code.lines) for code in codes("docs/finetune.md")]
    (text,) = (text for text in shown if "load_in_4bit = true" in text)
    return text


def _script(call: Call, monkeypatch: pytest.MonkeyPatch) -> int:
    """A benchmark or an example, whose module runs itself; its imports may be missing here."""
    missing = {}
    for name in NOT_INSTALLED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
            continue
        missing[name] = mock.MagicMock()
    monkeypatch.delitem(sys.modules, call.target, raising=False)  # runpy would warn of it
    monkeypatch.setattr(sys, "argv", [call.target, *call.words])
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    with mock.patch.dict(sys.modules, missing):
        if call.target.startswith("benchmarks/"):
            runpy.run_path(str(ROOT / call.target), run_name="__main__")
        else:
            runpy.run_module(call.target, run_name="__main__", alter_sys=True)
    raise AssertionError("a script ends itself")


@pytest.mark.parametrize(
    "call", [*CALLS, *EXAMPLES, *RECIPES], ids=lambda call: f"{call.where} {call.target}"
)
def test_command_parses(call, parse):
    error = parse(call)
    if call.is_inline and error is not None and "Missing from" in error:
        return  # the part that is meant
    assert error is None, f"{call.where}: {call.target} {shlex.join(call.words)}"


def test_there_are_commands_of_every_verb():
    """So that a parser of Markdown that finds nothing does not pass."""
    assert {call.target for call in CALLS} >= {*VERBS, "examples.finetune.zif"}
    assert len(CALLS) > 60
    assert {call.where for call in RECIPES} == {p.name for p in ROOT.glob("examples/*/*.toml")}
    assert "examples.tiny.corpus" in {call.target for call in RECIPES}


@pytest.mark.parametrize(
    ("target", "words", "error"),
    [
        ("sample", ("--prmpt", "x"), "Unrecognized options: --prmpt"),
        ("sample", ("tiny", "--mesh", "1x8", "--dtype", "float8"), "float8"),
        ("plan", ("--batch", "many"), "many"),
        ("plan", ("--mesh", "1x8", "--sweep"), "--sweep compares all meshes"),
        ("finetune", ("--config", "run.toml", "--no-such"), "--no-such"),
        ("benchmarks/decode.py", ("--no-such",), "--no-such"),
        ("examples.tiny.data", ("folder", "--no-such"), "--no-such"),
    ],
)
def test_a_planted_fault_is_found(target, words, error, parse):
    found = parse(Call("here", target, words))
    assert found is not None
    assert found.startswith(f"{USAGE}: ")
    assert error in found


# Options of other programs, in the blocks and sentences about them.
OTHERS = {
    "--nodes --ntasks-per-node --gpus-per-node --kill-on-bad-exit": "srun",
    "--worker --zone --command": "gcloud",
    "--beta --model-name-or-path --dataset-name --resume-from-checkpoint": "TRL",
    "--config-name": "run_clm.py of transformers",
    "--tasks --model-args --batch-size --output-path --apply-chat-template": "lm-eval",
    "--device-driver --logdir --continuous-batching": "docker, tensorboard, transformers serve",
    "--long --reduced": "scripts of ours",
}
_FLAG = re.compile(r"(?<![\w-])--[a-zA-Z][\w-]*")


def known_flags() -> set[str]:
    """Those of every command, benchmark and example."""
    known = {flag for flags in OTHERS for flag in flags.split()}
    known |= {*WITHOUT_EFFECT, *REFUSED, *_ALIASES, "--api-key", "--version"}
    for snapshot in (ROOT / "tests/snapshots").glob("help-*.txt"):
        known |= {*_FLAG.findall(snapshot.read_text("utf-8"))}
    for script in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*/*.py")]:
        source = script.read_text("utf-8")
        fields = re.findall(r"^    (\w+): .*= ", source, flags=re.MULTILINE)
        known |= {f"--{field.replace('_', '-')}" for field in fields}
    return known


def unknown_flags(text: str) -> set[str]:
    """Flags in code, inline or not, that no program here has; with - or _, as TRL has them."""
    shown = re.findall(r"`[^`]+`|^    .*$|^(?:python|mixtral-jax) .*$", text, flags=re.MULTILINE)
    flags = {flag.replace("_", "-") for each in shown for flag in _FLAG.findall(each)}
    return flags - known_flags()


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_exists(page):
    assert unknown_flags((ROOT / page).read_text("utf-8")) == set()


def test_an_unknown_flag_is_found():
    text = "`--mesh` and `sample --meshes 1x8`\n\n    python x.py --no-such\n"
    assert unknown_flags(text) == {"--meshes", "--no-such"} - known_flags()
    assert "--no-such" in unknown_flags(text)


def test_pages_are_those_of_people():
    assert {"README.md", "CONTRIBUTING.md", "docs/serve.md", "examples/tiny/README.md"} <= {*PAGES}
    assert all(Path(ROOT / page).is_file() for page in PAGES)
