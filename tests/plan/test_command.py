"""``python -m mixtral_jax.plan`` from outside: what it prints, refuses and draws."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from mixtral_jax import cli
from mixtral_jax.config import PRESETS
from mixtral_jax.plan.__main__ import Options, main
from mixtral_jax.plan.bill import Bill, make_bill, memory_of
from mixtral_jax.plan.devices import DEVICES
from mixtral_jax.plan.programs import Workload
from mixtral_jax.plan.schemes import weight_bytes
from mixtral_jax.plan.step import generation_steps
from mixtral_jax.plan.sweep import MAX_DEVICES, MOST_COMPILED, cheapest, draw, meshes, sweep
from mixtral_jax.sharding.mesh import MeshSpec
from tests.environ import DEVICES_FLAG, without_devices


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A flag of the caller's that would leave the command with fewer devices than it wants.
    environ = without_devices()
    environ["XLA_FLAGS"] += f" {DEVICES_FLAG}=2"
    return subprocess.run(
        [sys.executable, "-m", "mixtral_jax.plan", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environ,
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


@pytest.mark.slow
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
        ("--train full --quantize nf4", 64, "quantized weights cannot be trained"),
        ("--model tiny --quantize=", 64, "--quantize: expected int8"),
        ("--model tiny --mesh 1024x8", 64, "--mesh: expected at most 1024 devices, got 8192"),
        ("--mesh 1x128", 78, "mesh 1x128, which splits 8 experts inside as 1x8x16: expected"),
        ("--mesh 8", 64, "fix: --mesh 1x8"),
        ("--mesh 0x8", 64, "mesh axis data: expected at least 1"),
        ("--sweep --plot x.pdf", 64, "--plot: expected a name that ends in .svg or .png"),
        ("--sweep --plot nowhere/x.svg", 66, "no folder nowhere"),
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
    assert "; fix: " in err


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (
            "--model tiny --memory-fraction 1e-9 --max-devices 4",
            78,
            "no mesh of 4 or fewer h100 holds this; fix: choose a larger device, a smaller batch",
        ),
        (
            "--model tiny --memory-fraction 1e-9 --max-devices 4 --train full",
            78,
            "a batch that is a multiple of more devices (--batch 64), --fsdp",
        ),
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
    best = cheapest(work, "small", note=told.append).bill
    assert best is not None
    assert best.work.mesh.num_devices == 2
    assert best.fits
    assert told[0] == "compiling for 1x1"  # it holds the weights, but not the temporaries
    tiny = small._replace(memory_bytes=10_000)
    monkeypatch.setitem(devices.DEVICES, "small", tiny)
    assert cheapest(work, "small", note=told.append) == (None, True)


def test_the_search_for_the_cheapest_compiles_no_more_than_it_must(monkeypatch, small_config):
    """The fastest by formula first; the first that fits ends it; never more than the limit."""
    work = Workload(
        config=small_config(num_attention_heads=8, num_key_value_heads=8, head_dim=4),
        mesh=MeshSpec(),
        batch=64,
        context=64,
        dtype="float32",
    )
    tried: list[str] = []

    def nothing_holds(here, device, **options):
        tried.append(str(here.mesh))
        return False

    def bill(here, device, **options):
        weights = weight_bytes(here.config, here.mesh, here.strategy)
        return Bill(
            work=here,
            quantize=None,
            parameters=1,
            active_parameters=1,
            memory=memory_of(here, weights, 0),
            usable_bytes=10**12,
            steps=generation_steps(here, DEVICES[device], weights, 0),
            differences=[],
            not_compared=None,
        )

    monkeypatch.setattr("mixtral_jax.plan.sweep.holds", nothing_holds)
    assert cheapest(work, "h100", note=lambda line: None, most=2) == (None, True)
    assert set(tried) >= {"1x1", "2x1", "1x2", "1x1x2"}
    tried.clear()
    assert cheapest(work, "h100", note=lambda line: None) == (None, False)
    assert len(tried) == MOST_COMPILED
    monkeypatch.setattr("mixtral_jax.plan.sweep.holds", lambda *args, **options: True)
    monkeypatch.setattr("mixtral_jax.plan.sweep.make_bill", bill)
    found = cheapest(work, "h100", note=lambda line: None)
    assert found.bill is not None
    assert str(found.bill.work.mesh) == "1x1"


@pytest.mark.slow
def test_sweep_is_drawn(small_config, tmp_path):
    work = Workload(config=small_config(), mesh=MeshSpec(), batch=4, context=64, dtype="float32")
    bills = list(sweep(work, "v5e", counts=(1, 2), note=lambda line: None))
    assert [str(bill.work.mesh) for bill in bills] == ["1x1", "2x1", "1x2", "1x1x2"]
    draw(bills, "a title", tmp_path / "sweep.svg")
    text = (tmp_path / "sweep.svg").read_text()
    assert "a title" in text
    assert "tokens/s at the limit" in text


@pytest.mark.slow
def test_a_bill_of_8x7b_takes_less_than_two_minutes_and_four_gigabytes(tmp_path):
    script = tmp_path / "measured.py"
    script.write_text(
        "import resource, sys\n"
        "from mixtral_jax import cli\n"
        "from mixtral_jax.plan.__main__ import Options, main\n"
        "code = cli.run(main, Options, 'plan')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    arguments = ["--model", "mixtral-8x7b", "--mesh", "1x8", "--batch", "64", "--json"]
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - start < 120
    assert int(done.stderr.splitlines()[-1]) * 1024 < 4e9  # Linux counts in KiB
    assert json.loads(done.stdout)["fits"]
