"""What every command shares: options from a dataclass, one-line errors, exit codes."""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from mixtral_jax import environment
from mixtral_jax.commands import VERBS
from mixtral_jax.commands import prog as prog_of
from mixtral_jax.errors import (
    INPUT_NOT_FOUND,
    INTERNAL,
    INTERRUPTED,
    IO_ERROR,
    USAGE,
    MixtralError,
    printable,
)
from mixtral_jax.sharding import hosts

Options = TypeVar("Options")
# --flag without a --no-flag beside it; a sequence is its option repeated.
PLAIN = (tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(
    main: Callable[[Options], int],
    options_type: Any,
    prog: str,
    argv: Sequence[str] | None = None,
    markers: Sequence[Any] = PLAIN,
    examples: Sequence[str] = (),
) -> int:
    """Parses the command line, runs ``main`` and turns what it raises into an exit code.

    Errors are one line on stderr, ``error: ...``; with ``--debug`` (a field ``debug`` of the
    options) a traceback precedes it.

    Args:
        main: the command; returns its exit code.
        options_type: a frozen dataclass, whose docstrings are the help texts; or a union of such,
            one per subcommand.
        prog: how the command is called, for the help text.
        argv: arguments; those of the process unless given.
        markers: how tyro spells the options.
        examples: what may stand behind ``prog``; the last lines of ``--help``.

    Returns:
        The exit code.

    Raises:
        SystemExit: code 0 after ``--help``.
    """
    code = _run(main, options_type, prog, argv, markers, examples)
    try:
        hosts.leave(code)
    except KeyboardInterrupt:  # while it waits for the others
        hosts.leave(_fail(None, "interrupted", INTERRUPTED))
    except MixtralError as error:
        hosts.leave(_fail(None, str(error), error.code))
    return code


def run_verb(
    verb: str, main: Callable[[Options], int], options_type: Any, argv: Sequence[str]
) -> int:
    """``run`` for one of the commands, with the spelling and the examples of ``VERBS``."""
    found = VERBS[verb]
    markers = () if found.has_pairs else PLAIN
    return run(main, options_type, prog_of(verb), argv, markers, found.examples)


def _run(
    main: Callable[[Options], int],
    options_type: Any,
    prog: str,
    argv: Sequence[str] | None,
    markers: Sequence[Any],
    examples: Sequence[str],
) -> int:
    refusal = io.StringIO()
    words = sys.argv[1:] if argv is None else argv
    try:
        with contextlib.redirect_stderr(refusal):
            options = tyro.cli(
                options_type,
                prog=prog,
                args=words,
                config=markers,
                compact_help="--help" not in words,  # -h fits a screen, --help tells all
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            try:
                if examples and {"-h", "--help", "-H", "--help-verbose"} & {*words}:
                    print("\nexamples:", *(f"  {prog} {each}" for each in examples), sep="\n")
                sys.stdout.flush()
            except OSError as error:
                return failed_output(error)
            raise
        return _fail(None, _usage(refusal.getvalue(), prog), USAGE)
    except MixtralError as error:  # the options check themselves when they are made
        return _fail(None, str(error), error.code)
    except OSError as error:  # of --help
        return failed_output(error)
    try:
        environment.prepare()
        code = main(options)
        sys.stdout.flush()  # while what cannot be written can still be told
        return code
    except MixtralError as error:
        return _fail(options, str(error), error.code)
    except KeyboardInterrupt:
        return _fail(options, "interrupted", INTERRUPTED)
    except OSError as error:
        return failed_output(error, options)
    except Exception as error:
        hosts.await_verdict()
        return _fail(options, _internal(error), INTERNAL)


def failed_output(error: OSError, options: object = None) -> int:
    """The exit code of an error of the system, after its line; quiet where our reader went away.

    What stdout does not take is left out: the interpreter would try again, and say so.
    """
    try:
        sys.stdout.flush()
    except OSError:
        sys.stdout = io.StringIO()
    if isinstance(error, BrokenPipeError):
        sys.stdout = io.StringIO()
        return IO_ERROR
    if error.errno in _DISK_FULL:
        return _fail(options, f"the disk is full: {error}", IO_ERROR)
    missing = isinstance(error, FileNotFoundError)
    return _fail(options, _mendable(error), INPUT_NOT_FOUND if missing else IO_ERROR)


def _usage(box: str, prog: str) -> str:
    """One line from the box that tyro draws around what it refuses, in ASCII or not."""
    text = "\n".join(line.strip(" │╭╮╰╯") for line in box.splitlines())
    parts = re.split(r"\n[─-]+\n", re.sub(r"^─ (.*) ─+$", r"\1\n-", text, flags=re.MULTILINE))
    what = " ".join(parts[min(1, len(parts) - 1)].split()).rstrip(".")  # its title is part 0
    what = re.sub(r"^Error parsing (?!--)[^\s:]+: ", "", what)
    if "; fix: " in what:  # options that check themselves say it in our own words
        return what
    meant = re.search(r"Perhaps you meant:\n(--[\w-]+)", text)
    fix = meant[1] if meant else f"{prog} --help lists the options"
    if what.startswith("Missing from"):
        what = _missing(what)
    chosen = re.fullmatch(r"(.*'(.*)' for argument '(.*)'\. Expected one of) \((.*)\)", what)
    if chosen is not None:
        names = sorted({*re.findall(r"'([^']+)'", chosen[4])} - {"None"})
        what = f"{chosen[1]} {', '.join(names)}"
        for near in difflib.get_close_matches(chosen[2], names, n=1):
            fix = f"{chosen[3]} {near}"
    return f"{what}; fix: {fix}"


def _missing(what: str) -> str:
    """The options that are missing, each with its choices, without what it is for."""
    command, _, listed = what.partition(": ")
    options = [each.strip() for each in listed.split("(required)") if each.strip()]
    named = (re.match(r"(--\S+|[A-Z_]+\b)(?: \{\S*\})?", option) for option in options)
    return f"{command}: {', '.join(found[0] for found in named if found)}"


def _mendable(error: OSError) -> str:
    paths = [str(path) for path in (error.filename, error.filename2) if path is not None]
    where = f"{' -> '.join(paths)}: " if paths else ""
    what = error.strerror or str(error) or type(error).__name__
    return printable(f"{where}{what}; fix: check that path, its rights and its disk")


def _internal(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    line = f"internal: {type(error).__name__}: {first}; fix: run with --debug and report it"
    return printable(line)


def _fail(options: object, line: str, code: int) -> int:
    if getattr(options, "debug", False):
        traceback.print_exc()
    who = f"process {hosts.process_id()}: " if hosts.num_processes() > 1 else ""
    print(f"error: {who}{line}", file=sys.stderr)
    return code
