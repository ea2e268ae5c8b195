"""Benchmarks fail as the commands do: one line, an exit code that says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_jax.errors import BAD_CONFIG, INPUT_NOT_FOUND, USAGE

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("moe_layer --mesh 1x3 --quick", BAD_CONFIG),
        ("collectives --mesh foo", USAGE),
        ("scaling --meshes 1x1 foo --quick", USAGE),
        ("scaling --model foo", INPUT_NOT_FOUND),
        ("capacity_factor --mesh foo", USAGE),
    ],
)
def test_bad_input_is_one_line(arguments, code):
    name, *rest = arguments.split()
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *rest],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
