"""``python -m mixtral_jax.plan`` from outside: what it prints, refuses and draws."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mixtral_jax import cli
from mixtral_jax.config import PRESETS
from mixtral_jax.plan.__main__ import Options, main
from mixtral_jax.plan.bill import make_bill
from mixtral_jax.plan.programs import Workload
from mixtral_jax.plan.sweep import MAX_DEVICES, cheapest, draw, meshes, sweep
from mixtral_jax.sharding.mesh import MeshSpec


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A flag of the caller's that would leave the command with fewer devices than it wants.
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.run(
        [sys.executable, "-m", "mixtral_jax.plan", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **flags},
    )


def test_json():
    done = run("--model", "tiny", "--mesh", "1x8", "--batch", "16", "--context", "64", "--json")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["mesh"] == "1x8"
    assert found["dtype"] == "float32"
    assert found["cheapest_mesh"] == "1x1"
    assert found["not_split"] == ["sequence", "pipeline"]
    per_device = found["per_device"]
    parts = [size for name, size in per_device.items() if name != "total_bytes"]
    assert per_device["total_bytes"] == sum(parts)
    assert found["fits"]
    assert found["tokens_per_second"] == found["steps"]["decode"]["tokens_per_second"]
    assert {each["step"] for each in found["collectives"]} == {"prefill", "decode"}
    assert "note:" not in done.stderr  # formulas and compiled programs agree


def test_text_says_what_is_not_split():
    done = run("--model", "tiny", "--context", "64", "--price", "3")
    assert done.returncode == 0, done.stderr
    assert "mesh 1x1" in done.stdout
    assert "fits in 72.0 GB" in done.stdout
    assert "a million tokens:" in done.stdout
    assert "sequence and pipeline parallelism are not built" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ("--model nope", 66, "no model nope"),
        ("--mesh 3x3", 78, "mesh 3x3"),
        ("--device b200", 64, "--device: expected h100"),
        ("--batch 0", 64, "--batch: expected at least 1"),
        ("--context 99999", 64, "--context: expected at most 32768"),
        ("--plot x.svg", 64, "--plot"),
        ("--sweep --mesh 1x8", 64, "leave out --mesh"),
        ("--fsdp", 64, "--train full"),
        ("--train lora --kv-dtype int8", 64, "--kv-dtype: training has no cache"),
        ("--train full --mesh 2x4 --batch 3", 78, "a multiple of data x expert (8)"),
    ],
)
def test_refusals(arguments, code, line, capsys):
    assert cli.run(main, Options, "plan", arguments.split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert line in err


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        ("--model tiny --quantize int3 --mesh 1x1", 64, "--quantize: expected int8"),
        ("--model tiny --memory-fraction 1e-9", 78, "no mesh of 256 or fewer h100 holds this"),
    ],
)
def test_refusals_after_compiling_began(arguments, code, line):
    done = run(*arguments.split())
    assert done.returncode == code
    assert done.stdout == ""
    assert line in done.stderr
    assert "Traceback" not in done.stderr


def test_meshes_are_those_that_fit_the_model():
    work = Workload(config=PRESETS["mixtral-8x7b"], mesh=MeshSpec())
    found = {str(mesh) for mesh in meshes(work, 16)}
    assert "1x8x2" in found
    assert "2x8" in found
    assert "1x16" not in found  # the same as 1x8x2
    assert "1x1x16" not in found  # eight key/value heads
    assert all(MeshSpec.parse(name).num_devices == 16 for name in found)
    assert sum(1 for _ in meshes(work, MAX_DEVICES)) > 3


@pytest.mark.slow
def test_the_cheapest_is_the_first_size_that_fits(monkeypatch, small_config):
    from mixtral_jax.plan import devices

    config = small_config()
    work = Workload(config=config, mesh=MeshSpec(), batch=4, context=64, dtype="float32")
    alone = make_bill(work, "h100", whole=False).memory.total_bytes
    small = devices.DEVICES["h100"]._replace(memory_bytes=int(alone / 0.9) - 1000)
    monkeypatch.setitem(devices.DEVICES, "small", small)
    told: list[str] = []
    best = cheapest(work, "small", note=told.append)
    assert best is not None
    assert best.work.mesh.num_devices == 2
    assert best.fits
    assert told[0] == "compiling for 1x1"  # it holds the weights, but not the temporaries
    tiny = small._replace(memory_bytes=10_000)
    monkeypatch.setitem(devices.DEVICES, "small", tiny)
    assert cheapest(work, "small", note=told.append) is None


def test_sweep_is_drawn(small_config, tmp_path):
    work = Workload(config=small_config(), mesh=MeshSpec(), batch=4, context=64, dtype="float32")
    bills = list(sweep(work, "v5e", counts=(1, 2), note=lambda line: None))
    assert [str(bill.work.mesh) for bill in bills] == ["1x1", "2x1", "1x2", "1x1x2"]
    draw(bills, "a title", tmp_path / "sweep.svg")
    text = (tmp_path / "sweep.svg").read_text()
    assert "a title" in text
    assert "tokens/s at the limit" in text
