"""Benchmarks fail as the commands do: one line, an exit code that says why."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mixtral_jax.convert.load import HOST
from mixtral_jax.errors import BAD_CONFIG, INPUT_NOT_FOUND, OK, USAGE
from mixtral_jax.offload.parts import take_apart
from mixtral_jax.qtensor import QTensor

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


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_experts_of_any_kind_are_offloaded_one_by_one(monkeypatch, scheme):
    """Plain ones lie apart for the resident model too, in codes they are one stack per layer."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    offload = importlib.import_module("offload")
    model, _ = offload.models(offload.Options(model="small", quantize=scheme))
    parts = take_apart(model.config, offload.split(model, jax.devices()[0]))
    assert parts.num_experts == 2 * 8
    kinds = {part.sharding.memory_kind for part in jax.tree.leaves(parts.experts)}
    assert kinds == {HOST}
    assert isinstance(parts.experts[1][7].down, jax.Array if scheme is None else QTensor)


@pytest.mark.slow
def test_offloaded_experts_write_the_same_tokens_plain_and_in_codes():
    """The quick benchmark of them fails by itself if they do not."""
    done = subprocess.run(
        [sys.executable, "benchmarks/offload.py", "--quick", "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == OK, done.stderr
    plain, coded = map(json.loads, done.stdout.splitlines())
    assert (plain["quantize"], coded["quantize"]) == (None, "int8")
    assert coded["expert_bytes"] < 0.6 * plain["expert_bytes"]
    assert [row["experts there"] for row in plain["rows"]] == ["16/16", "5/16"]
