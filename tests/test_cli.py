"""Exit codes and one-line errors that every command shares."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
import tyro

from mixtral_jax import cli
from mixtral_jax.errors import (
    BAD_DATA,
    INPUT_NOT_FOUND,
    INTERNAL,
    INTERRUPTED,
    IO_ERROR,
    USAGE,
    MixtralError,
)

ROOT = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What it does."""

    size: int = 3
    """How large."""
    debug: bool = False
    """Show tracebacks."""


def raising(error: BaseException) -> Callable[[Options], int]:
    def main(options: Options) -> int:
        raise error

    return main


def test_options_arrive_and_the_code_comes_back():
    seen = []

    def main(options: Options) -> int:
        seen.append(options)
        return 7

    assert cli.run(main, Options, "verb", ["--size", "5"]) == 7
    assert seen == [Options(size=5)]


@pytest.mark.parametrize("argv", [["--size", "x"], ["--no-such"], ["stray"]], ids=str)
def test_wrong_usage_is_64(argv, capsys):
    assert cli.run(raising(AssertionError()), Options, "verb", argv) == USAGE
    assert capsys.readouterr().out == ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strict:
    """Options that must be given, or have few values."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Where from."""
    scheme: Literal["int8", "nf4", "gptq"]
    """How. Several sentences (required) say so."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of what."""


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "Missing from verb: SRC, --scheme {int8,nf4,gptq}; fix: verb --help lists the"),
        (["x"], "Missing from verb: --scheme {int8,nf4,gptq}; fix: verb --help lists the"),
        (
            ["x", "--scheme", "int3"],
            "argument '--scheme'. Expected one of gptq, int8, nf4; fix: --scheme int8",
        ),
        (
            ["x", "--scheme", "nf4", "--dtype", "bf16"],
            "Expected one of bfloat16, float16, float32; fix: --dtype bfloat16",
        ),
        (["x", "--scheme", "zzz"], "Expected one of gptq, int8, nf4; fix: verb --help lists"),
    ],
    ids=str,
)
def test_what_is_missing_or_no_choice_is_named(argv, line, capsys):
    assert cli.run(raising(AssertionError()), Strict, "verb", argv) == USAGE
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_help_is_0(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(AssertionError()), Options, "verb", ["--help"])
    assert stop.value.code in (None, 0)
    assert "How large" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MixtralError("bad w", fix="mend it", code=BAD_DATA), BAD_DATA, "error: bad w; fix: mend"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
        (OSError(errno.ENOSPC, "No space left"), IO_ERROR, "disk is full"),
        (OSError(errno.EDQUOT, "Quota"), IO_ERROR, "disk is full"),
        (PermissionError(errno.EACCES, "Denied", "a/b"), IO_ERROR, "error: a/b: Denied"),
        (NotADirectoryError(errno.ENOTDIR, "Not a folder", "b"), IO_ERROR, "error: b: Not a"),
        (IsADirectoryError(errno.EISDIR, "Is a folder", "b"), IO_ERROR, "error: b: Is a"),
        (FileExistsError(errno.EEXIST, "Is there", "a", None, "b"), IO_ERROR, "a -> b: Is there"),
        (FileNotFoundError(errno.ENOENT, "No file", "a\n"), INPUT_NOT_FOUND, "a\\n: No file"),
        (OSError("torn"), IO_ERROR, "error: torn; fix: "),
        (MixtralError("w\n\x1b[31m", code=BAD_DATA), BAD_DATA, "error: w\\n\\x1b[31m"),
        (RuntimeError("first\nsecond"), INTERNAL, "RuntimeError: first; fix: run with --debug"),
        (RuntimeError(), INTERNAL, "RuntimeError"),
    ],
    ids=repr,
)
def test_faults_are_one_line_and_their_code(error, code, words, capsys):
    assert cli.run(raising(error), Options, "verb", []) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_debug_shows_the_traceback(capsys):
    assert cli.run(raising(RuntimeError("why")), Options, "verb", ["--debug"]) == INTERNAL
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("error: ")


def test_reader_that_went_away_is_quiet(capsys):
    assert cli.run(raising(BrokenPipeError()), Options, "verb", []) == IO_ERROR
    assert capsys.readouterr().err == ""


def test_help_whose_reader_went_away_is_quiet():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mixtral_jax.plan", "--help"]
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (IO_ERROR, b"")
