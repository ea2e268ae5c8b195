"""What keeps the house small: sizes, banned names, a light import. Each guard is seen to bite."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

import mixtral_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mixtral_jax"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_IMPORT_SECONDS = 0.3
HEAVY = ("jax", "flax", "numpy", "orbax", "optax", "tyro")

BANNED = {
    r"jax\._src": "private",
    r"check_vma\s*=\s*False": "the replication check stays on",
    r"jax\.experimental(\.| import )shard_map": "dead: use jax.shard_map",
    r"\b(TODO|FIXME)\b(?!\(#\d+\))": "write TODO(#issue) or do it",
}


def long_file(source: str) -> list[str]:
    lines = len(source.splitlines())
    return [f"{lines} lines, allowed {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []


def long_functions(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{node.name}: {lines} lines, allowed {MAX_FUNCTION_LINES}")
    return found


def banned_names(source: str) -> list[str]:
    return [
        f"line {number}: {line.strip()} ({reason})"
        for number, line in enumerate(source.splitlines(), 1)
        for pattern, reason in BANNED.items()
        if re.search(pattern, line)
    ]


GUARDS: dict[Callable[[str], list[str]], list[str]] = {
    # guard -> sources that it must find
    long_file: ["x = 1\n" * (MAX_FILE_LINES + 1)],
    long_functions: [
        "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES,
        "class A:\n    async def f(self):\n" + "        x = 1\n" * MAX_FUNCTION_LINES,
    ],
    banned_names: [
        "from jax._src import core",
        "jax.shard_map(f, check_vma = False)",
        "from jax.experimental.shard_map import shard_map",
        "from jax.experimental import shard_map",
        "x = 1  # TODO: later",
    ],
}
HARMLESS = [
    "x = 1\n" * MAX_FILE_LINES,
    "def f():\n" + "    x = 1\n" * (MAX_FUNCTION_LINES - 1),
    "jax.shard_map(f, check_vma=True)  # TODO(#12): more",
]
OTHERS = ("examples", "benchmarks")
SOURCES = sorted([PACKAGE, *(ROOT / name for name in OTHERS)])
SOURCES = sorted(path for folder in SOURCES for path in folder.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_keeps_the_rules(path):
    source = path.read_text(encoding="utf-8")
    assert [fault for guard in GUARDS for fault in guard(source)] == []


@pytest.mark.parametrize(
    ("guard", "planted"),
    [(guard, source) for guard, sources in GUARDS.items() for source in sources],
)
def test_guard_finds_the_planted_fault(guard, planted):
    assert len(guard(planted)) == 1


@pytest.mark.parametrize("source", HARMLESS)
def test_guards_let_the_allowed_pass(source):
    assert [fault for guard in GUARDS for fault in guard(source)] == []


# Prints the best of three import times, then the heavy modules that came along.
IMPORT_PROGRAM = """
import sys, time
def timed():
    for name in [n for n in sys.modules if n.split(".")[0] == "mixtral_jax"]:
        del sys.modules[name]
    start = time.perf_counter()
    import mixtral_jax
    {then}
    return time.perf_counter() - start
print(min(timed() for _ in range(3)))
print(*[name for name in {heavy} if name in sys.modules])
"""


def imported(then: str = "pass") -> tuple[float, list[str]]:
    program = IMPORT_PROGRAM.format(then=then, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True
    )
    seconds, heavy = done.stdout.split("\n")[:2]
    return float(seconds), heavy.split()


def test_import_is_light():
    seconds, heavy = imported()
    assert heavy == []
    assert seconds < MAX_IMPORT_SECONDS


def test_configuration_and_errors_are_light():
    _, heavy = imported("mixtral_jax.PRESETS, mixtral_jax.MixtralError")
    assert heavy == []


def test_version_is_that_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert mixtral_jax.__version__ == project["version"]


def test_import_guard_sees_heavy_modules():
    _, heavy = imported("import mixtral_jax.model.rope")
    assert "jax" in heavy
