"""What scripts rely on matches a committed text: the public names and every command's --help.

After a change that is meant: ``UPDATE_SNAPSHOTS=1 pytest tests/test_snapshots.py``, then read the
difference and name it in CHANGELOG.md.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mixtral_jax

ROOT = Path(__file__).parent.parent
SNAPSHOTS = Path(__file__).parent / "snapshots"
COMMANDS = [
    "sample",
    "convert",
    "quantize",
    "sharding",
    "plan",
    "evaluate",
    "evaluate perplexity",
    "evaluate exact",
    "evaluate routing",
    "serve",
    "finetune",
]


def compare(name: str, text: str, folder: Path = SNAPSHOTS) -> None:
    """Fails where ``text`` differs from the snapshot; writes it instead if asked to."""
    path = folder / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS") == "1":
        folder.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"no snapshot {path.name}: run with UPDATE_SNAPSHOTS=1"
    assert text == path.read_text(encoding="utf-8")


# Each as ``python -m`` runs it, all in one process: it is importing that takes time.
HELP = """
import contextlib, io, json, runpy, sys
found = {}
for command in sys.argv[1:]:
    module, *words = f"mixtral_jax.{command}".split()
    sys.argv, code = [module, *words, "--help"], None
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as out:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    out.seek(0)
    found[command] = code, out.read()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int, str]]:
    """Exit code and text of every command's --help."""
    plain = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    environment = {key: value for key, value in os.environ.items() if key != "FORCE_COLOR"}
    done = subprocess.run(
        [sys.executable, "-c", HELP, *COMMANDS],
        cwd=ROOT,
        env=environment | plain,
        check=False,
        capture_output=True,
        encoding="utf-8",
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help(helps, command):
    code, text = helps[command]
    assert code == 0
    lines = (line.rstrip() for line in text.strip().splitlines())
    compare(f"help-{command.replace(' ', '-')}", "\n".join(lines) + "\n")


def describe(name: str) -> str:
    """A public name with its parameters, annotations left out: they differ by Python version."""
    value = getattr(mixtral_jax, name)
    if not callable(value):
        return name
    lines = [signature(name, value)]
    for member in sorted(vars(value)) if inspect.isclass(value) else ():
        # A dataclass's fields are in its signature already.
        if member.startswith("_") or member in getattr(value, "__dataclass_fields__", ()):
            continue
        attribute = inspect.getattr_static(value, member)
        function = getattr(attribute, "__func__", attribute)
        shown = signature(member, function) if inspect.isfunction(function) else member
        lines.append(f"    {shown}")
    return "\n".join(lines)


def signature(name: str, value: Callable[..., object]) -> str:
    whole = inspect.signature(value)
    bare = [p.replace(annotation=p.empty) for p in whole.parameters.values()]
    text = str(whole.replace(parameters=bare, return_annotation=whole.empty))
    return name + re.sub(r" at 0x[0-9a-f]+", "", text)


def test_public_names():
    names = sorted(set(mixtral_jax.__all__))
    assert names == sorted(mixtral_jax.__all__), "a name is listed twice"
    compare("public-names", "\n".join(map(describe, names)) + "\n")


def test_every_public_name_is_listed_by_dir_and_unknown_ones_are_refused():
    assert set(mixtral_jax.__all__) <= set(dir(mixtral_jax))
    assert not hasattr(mixtral_jax, "no_such_name")


def test_a_changed_text_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("UPDATE_SNAPSHOTS", "1")
    compare("sample", "old\n", tmp_path)
    monkeypatch.delenv("UPDATE_SNAPSHOTS")
    compare("sample", "old\n", tmp_path)
    with pytest.raises(AssertionError):
        compare("sample", "new\n", tmp_path)
    with pytest.raises(AssertionError, match="UPDATE_SNAPSHOTS"):
        compare("other", "old\n", tmp_path)
