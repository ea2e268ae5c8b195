"""Finds the commands in Markdown: blocks of shell, fenced or indented, and inline code.

A block that a test cannot run has a comment before it, which a reader hardly sees:
``<!-- needs: gpu -->``. ``<!-- test: slow -->`` leaves it to ``make slow``.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The log, the ADRs and the records say what was done, with the commands of that day.
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "examples/*/README.md")
    for path in ROOT.glob(pattern)
    if path.name not in ("log.md", "performance.md") and path.parent.name != "adr"
)
NEEDS = ("gpu", "hub", "cluster", "hours", "a clone with git")
_FENCE = re.compile(r"^( *)```(\w*)")
_MARK = re.compile(r"^\s*<!-- (needs|test): (.*?) -->\s*$")
_BEGINS = re.compile(r"\$ |(python3?|mixtral-jax|pip|make|curl|srun|gcloud) ")
_SHELLS = ("sh", "console", "bash", "shell")
_OURS = re.compile(
    r"(?:python3? -m mixtral_jax[. ](?P<module>\w+)|(?<![\w/-])mixtral-jax (?P<script>-*\w+)"
    r"|python3? -m (?P<example>examples(?:\.\w+)+)|python3? (?P<benchmark>benchmarks/\w+\.py))"
    r"(?P<rest>.*)",
    re.DOTALL,
)
_STOPS = (">", "|", "&&", ";", "&", "<", "2>", "2>&1")


@dataclasses.dataclass(frozen=True)
class Code:
    """A block of code as it stands, with the mark before it."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]
    mark: tuple[str, str] | None

    @property
    def where(self) -> str:
        """For the names of tests, and for people."""
        return f"{self.page}:{self.line}"

    @property
    def is_shell(self) -> bool:
        """Whether it shows commands; an indented block does if its first line is one."""
        return self.language in _SHELLS or (
            not self.language and bool(_BEGINS.match(self.lines[0]))
        )

    def commands(self) -> list[str]:
        """Each command in one line. Where some lines begin with ``$``, the others are output."""
        has_prompts = any(line.startswith("$ ") for line in self.lines)
        found: list[str] = []
        is_open = False
        for line in self.lines:
            if is_open:
                found[-1] += "\n" + line
            elif has_prompts:
                if not line.startswith("$ "):
                    continue
                found.append(line[2:])
            elif self.language or _BEGINS.match(line):
                if not line.strip() or line.lstrip().startswith("#"):
                    continue
                found.append(line)
            else:
                continue
            is_open = line.rstrip().endswith("\\")
        return [re.sub(r"\\\s*\n\s*", "", command) for command in found]

    def output(self) -> list[str]:
        """What a block with prompts shows of what its commands print."""
        if not any(line.startswith("$ ") for line in self.lines):
            return []
        return [line for line in self.lines if line.strip() and not line.startswith("$ ")]


@dataclasses.dataclass(frozen=True)
class Call:
    """One of our commands: ``target`` is a verb, a module of examples or a benchmark's file."""

    where: str
    target: str
    words: tuple[str, ...]
    is_inline: bool = False

    @property
    def is_script(self) -> bool:
        """An example or a benchmark, and no verb."""
        return self.target.startswith(("examples.", "benchmarks/"))


class Marks(Exception):
    """A mark before no block, or one that means nothing."""


def codes(page: str, text: str | None = None) -> list[Code]:
    """All blocks of code of a page, fenced and indented.

    Raises:
        Marks: a mark with no block of shell behind it, or of another meaning.
    """
    lines = (ROOT / page).read_text("utf-8").splitlines() if text is None else text.splitlines()
    found: list[Code] = []
    mark: tuple[str, str] | None = None
    before, at = "", 0
    while at < len(lines):
        line = lines[at]
        fence, begin = _FENCE.match(line), at
        if fence:
            end = next(k for k in range(at + 1, len(lines)) if lines[k].strip() == "```")
            inner, at = [each[len(fence[1]) :] for each in lines[begin + 1 : end]], end + 1
            found.append(Code(page, begin + 1, fence[2] or "text", tuple(inner), mark))
        elif re.match(r"    \S", line) and not before.strip():
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            inner = [each[4:] for each in lines[begin:at]]
            found.append(Code(page, begin + 1, "", tuple(inner), mark))
        else:
            at += 1
            if given := _MARK.match(line):
                _check_mark(mark, given, f"{page}:{at}")
                mark = (given[1], given[2])
            elif line.strip() and mark is not None:
                raise Marks(f"{page}:{at}: a mark with no block behind it")
            before = "" if given else line
            continue
        if mark is not None and not found[-1].is_shell:
            raise Marks(f"{found[-1].where}: a mark before what is no block of shell")
        mark, before = None, ""
    if mark is not None:
        raise Marks(f"{page}: a mark with no block behind it")
    return found


def _check_mark(before: tuple[str, str] | None, given: re.Match[str], where: str) -> None:
    allowed = NEEDS if given[1] == "needs" else ("slow",)
    if before is not None:
        raise Marks(f"{where}: two marks before one block")
    if given[2] not in allowed:
        raise Marks(f"{where}: expected {given[1]}: {' or '.join(allowed)}, got {given[2]}")


def calls(page: str, text: str | None = None) -> Iterator[Call]:
    """Our commands on a page: in blocks of any language, and inline."""
    for code in codes(page, text):
        whole = "\n".join(code.lines)
        whole = re.sub(r"\\\n\s*", "", whole)  # continued lines, and those of YAML
        whole = re.sub(r"\n\s+(?=--\w)", " ", whole)
        for line in whole.splitlines():
            if not code.is_shell and "exec python" not in line:
                continue
            if (call := call_of(line, code.where)) and call.words:
                yield call
    lines = (ROOT / page).read_text("utf-8").splitlines() if text is None else text.splitlines()
    for number, line in enumerate(lines, 1):
        for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
            call = call_of(span, f"{page}:{number}", is_inline=True)
            if call is not None and call.words:
                yield call


def call_of(line: str, where: str, *, is_inline: bool = False) -> Call | None:
    """What a line calls, if it is one of our commands."""
    found = _OURS.search(line)
    if found is None or (is_inline and found.start() > 0):
        return None
    target = next(filter(None, (found[n] for n in ("module", "script", "example", "benchmark"))))
    rest = re.sub(r"\$\([^()]*\)|\$\{?\w+\}?", "0", found["rest"])
    if is_inline:
        rest = rest.replace("[", " ").replace("]", " ").replace("...", " ")
    if rest.count("'") % 2 and rest.endswith("'"):
        rest = rest[:-1]  # the end of what was quoted for another shell
    words: list[str] = []
    for word in shlex.split(rest, comments=True):
        if word in _STOPS:
            break
        words.append(word.split("|")[0] if is_inline else word)
    return Call(where, target, tuple(words), is_inline)
