"""One-line errors for people, and the exit codes that scripts may rely on."""

from __future__ import annotations

from collections.abc import Iterable

OK = 0
USAGE = 64
BAD_DATA = 65
INPUT_NOT_FOUND = 66
INTERNAL = 70
OUTPUT_EXISTS = 73
IO_ERROR = 74
INTERRUPTED = 75
PEER_LOST = 76
BAD_CONFIG = 78


class MixtralError(ValueError):
    """A fault that a person can mend, told in one line.

    Args:
        what: what went wrong, and the file or tensor it concerns.
        expected: what would have been right.
        got: what was found instead.
        fix: what the reader can do about it.
        code: the exit code of the command line (one of the constants of this module).
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
        code: int = BAD_CONFIG,
    ):
        line = what
        if expected is not None:
            line += f": expected {expected}, got {got}"
        if fix is not None:
            line += f"; fix: {fix}"
        super().__init__(printable(line))
        self.code = code


def interrupted() -> MixtralError:
    """The error of work that was stopped, and that the same command takes up again."""
    fix = "run the same command again to resume"
    return MixtralError("interrupted", fix=fix, code=INTERRUPTED)


def printable(text: str) -> str:
    """A text from anywhere as one harmless line: names in files may hold newlines or escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# 8x22B has 1,739 tensors: a list of some hundreds tells what is wrong with any model.
MOST_LISTED = 500


def listing(problems: Iterable[str]) -> str:
    """Problems in order, as part of a line; beyond some hundreds, how many more there are."""
    found = sorted(problems)
    more = [f"and {len(found) - MOST_LISTED} more"] if len(found) > MOST_LISTED else []
    return "; ".join([*found[:MOST_LISTED], *more])
