"""``mixtral-jax VERB ...``, or ``python -m mixtral_jax VERB ...``: every command by one name."""

from __future__ import annotations

import difflib
import functools
import importlib
import itertools
import operator
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from mixtral_jax.commands import PROGRAM, VERBS
from mixtral_jax.errors import OK, USAGE, MixtralError

SHELLS = ("bash", "zsh", "fish")
_EXAMPLES = (
    'sample --chat --prompt "12+30="            # the embedded model',
    "plan --model mixtral-8x7b --mesh 1x8       # what it costs",
    "sample -h              # options in short; --help explains each",
    "completion bash        # prints shell completion: bash, zsh, fish",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Hands the arguments behind the verb to its module, and gives its exit code.

    Only that module is imported, so help and version are instant.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in ("-h", "--help", "help") and len(words) == 2 and words[1] in VERBS:
        words = [words[1], "--help"]
    if words and words[0] in VERBS:
        return importlib.import_module(VERBS[words[0]].module).run(words[1:])
    try:
        try:
            return _own(words)
        finally:
            sys.stdout.flush()  # while what cannot be written can still be told
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        from mixtral_jax import cli

        return cli.failed_output(error)


def _own(words: Sequence[str]) -> int:
    """What no verb does: help, version and completion.

    Raises:
        MixtralError: exit code 64 for anything else.
    """
    if not words:
        print(help_text(), file=sys.stderr)
        return USAGE
    verb, *rest = words
    if verb == "completion":
        return _complete(rest)
    is_help = verb in ("-h", "--help", "help")
    if not is_help and verb not in ("-V", "--version", "version"):
        raise _unknown("no such command", [*VERBS, "completion"], verb)
    if is_help and len(rest) == 1:
        raise _unknown(f"{PROGRAM} help", [*VERBS], rest[0])
    if rest:
        what, fix = f"{PROGRAM} {verb}", f"{PROGRAM} {rest[0]} --help"
        fix = fix if rest[0] in VERBS else "leave it out"
        got = repr(" ".join(rest))
        raise MixtralError(what, expected="nothing behind it", got=got, fix=fix, code=USAGE)
    if is_help:
        print(help_text())
        return OK
    from mixtral_jax import __version__

    print(f"{PROGRAM} {__version__}")
    return OK


def help_text() -> str:
    """All verbs by group, and examples; fits a screen of 80 by 24."""
    lines = [f"usage: {PROGRAM} VERB [options]; {PROGRAM} --version"]
    for group, verbs in itertools.groupby(VERBS.items(), key=lambda item: item[1].group):
        lines += ["", group, *(f"  {name:<10}{verb.line}" for name, verb in verbs)]
    return "\n".join([*lines, "", "examples", *(f"  {PROGRAM} {each}" for each in _EXAMPLES)])


def _complete(words: Sequence[str]) -> int:
    """Prints a completion script: one parser of all verbs, which tyro turns into one."""
    if len(words) != 1 or words[0] not in SHELLS:
        raise _unknown(f"{PROGRAM} completion", SHELLS, " ".join(words))
    import tyro

    from mixtral_jax import cli

    parsers = []
    for name, verb in VERBS.items():
        module, _, options = verb.options.partition(":")
        kind: Any = getattr(importlib.import_module(module), options)
        markers = () if verb.has_pairs else cli.PLAIN
        parsers.append(Annotated[(kind, tyro.conf.subcommand(name), *markers)])
    options: Any = functools.reduce(operator.or_, parsers)
    tyro.cli(options, prog=PROGRAM, args=["--tyro-print-completion", words[0]])
    return OK


def _unknown(what: str, allowed: Sequence[str], got: str) -> MixtralError:
    near = difflib.get_close_matches(got, allowed, n=1)
    fix = f"write {near[0]}" if near else f"{PROGRAM} --help"
    return MixtralError(what, expected=", ".join(allowed), got=repr(got), fix=fix, code=USAGE)


if __name__ == "__main__":
    sys.exit(main())
