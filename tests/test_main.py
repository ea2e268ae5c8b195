"""One name for every command: what it imports, its exit codes, its help and its completion."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

from mixtral_jax import __version__, commands
from mixtral_jax.__main__ import SHELLS, help_text, main
from mixtral_jax.commands import VERBS
from mixtral_jax.errors import IO_ERROR, OK, USAGE
from tests.test_guards import HEAVY, ROOT


def test_it_hands_over_what_follows_the_verb(monkeypatch):
    seen = []

    def run(argv: Sequence[str]) -> int:
        seen.append(list(argv))
        return 75

    monkeypatch.setattr(importlib.import_module(VERBS["sample"].module), "run", run)
    assert main(["sample", "--prompt", "a b", "--json"]) == 75
    assert seen == [["--prompt", "a b", "--json"]]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_module_with_options(verb):
    assert callable(importlib.import_module(VERBS[verb].module).run)
    module, _, name = VERBS[verb].options.partition(":")
    assert getattr(importlib.import_module(module), name)
    assert 2 <= len(VERBS[verb].examples) <= 3


def test_a_verb_refuses_with_its_own_code(capsys):
    assert main(["sample"]) == USAGE
    assert capsys.readouterr().err.startswith("error: what to sample: expected one of")


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["smaple"], "got 'smaple'; fix: write sample"),
        (["nothing-like-it"], "fix: mixtral-jax --help"),
        (["help", "smaple"], "fix: write sample"),
        (["--version", "foo"], "mixtral-jax --version: expected nothing behind it, got 'foo'"),
        (["completion"], "expected bash, zsh, fish"),
        (["completion", "fsh"], "fix: write fish"),
        (["completion", "bash", "zsh"], "got 'bash zsh'"),
    ],
    ids=" ".join,
)
def test_what_is_no_command_is_refused_in_one_line(words, error, capsys):
    assert main(words) == USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert error in captured.err


def test_help_of_a_verb(capsys):
    with pytest.raises(SystemExit):
        main(["help", "sharding"])
    assert "--mesh" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--help", "completion bash", "evaluate --help"])
@pytest.mark.parametrize(("to", "line"), [("/dev/full", "error: "), ("a pipe", "")])
def test_output_that_cannot_be_written_is_74(words, to, line):
    """Nobody reads the pipe; the disk is full."""
    command = [sys.executable, "-m", "mixtral_jax", *words.split()]
    with contextlib.ExitStack() as stack:
        if to == "a pipe":
            reader, out = os.pipe()
            os.close(reader)
            stack.callback(os.close, out)
        else:
            out = stack.enter_context(open(to, "w", encoding="utf-8"))
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == IO_ERROR, done.stderr
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == bool(line)


def test_help_lists_every_verb_on_one_screen(capsys):
    assert main(["--help"]) == OK
    text = capsys.readouterr().out
    assert text == help_text() + "\n"
    assert all(f"\n  {verb} " in text for verb in VERBS)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) < 80
    assert main([]) == USAGE
    assert capsys.readouterr().err == text


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag, capsys):
    assert main([flag]) == OK
    assert capsys.readouterr().out == f"mixtral-jax {__version__}\n"


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(flag):
    program = f"""
import sys
from mixtral_jax.__main__ import main
main([{flag!r}])
print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith(("usage: mixtral-jax", "mixtral-jax "))
    assert done.stderr == "\n"


@pytest.mark.parametrize("called", ["/usr/bin/mixtral-jax", "C:\\x\\mixtral-jax.exe", "sample.py"])
def test_help_says_how_the_verb_was_called(called, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called.replace("\\", "/")])
    script = "mixtral-jax sample"
    assert commands.prog("sample") == (
        script if "mixtral" in called else "python -m mixtral_jax.sample"
    )


def test_python_m_runs_it_too():
    command = [sys.executable, "-m", "mixtral_jax", "sharding", "tiny", "--mesh", "1x7"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 78
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_verbs_and_their_options(shell, capsys):
    with pytest.raises(SystemExit) as end:
        main(["completion", shell])
    assert end.value.code in (None, OK)
    script = capsys.readouterr().out
    for word in (*VERBS, "--show-experts", "--use-peft", "--no-use-peft", "perplexity"):
        assert word in script, word
    assert "mixtral-jax" in script


def test_bash_completes(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out, encoding="utf-8")

    def complete(*words: str) -> list[str]:
        program = """
source "$1"; shift
COMP_WORDS=(mixtral-jax "$@"); COMP_CWORD=$#
$(complete -p mixtral-jax | sed 's/.*-F \\([^ ]*\\).*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""
        done = subprocess.run(
            ["bash", "-c", program, "bash", str(tmp_path / "script"), *words],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.split()

    assert complete("sa") == ["sample"]
    assert complete("sample", "--show") == ["--show-experts"]
    assert complete("plan", "--dispatch", "repl") == ["replicated"]
    assert complete("evaluate", "perp") == ["perplexity"]
