"""The bill of offloaded experts: arithmetic, and what a run of it would hold."""

from __future__ import annotations

import dataclasses
import json

import pytest

import mixtral_jax as mj
from mixtral_jax import cli
from mixtral_jax.config import PRESETS
from mixtral_jax.decode.generate import row_bucket, slot_bucket
from mixtral_jax.errors import BAD_CONFIG, USAGE
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.offload.executor import OffloadExecutor
from mixtral_jax.offload.load import Generating, least_of
from mixtral_jax.plan import offload as plans
from mixtral_jax.plan.__main__ import Options, main, workload
from mixtral_jax.plan.devices import DEVICES
from mixtral_jax.quantize.driver import quantize_checkpoint
from mixtral_jax.quantize.makers import Recipe

RUN = ("--model", "tiny", "--offload", "experts", "--context", "100")


@pytest.fixture(autouse=True)
def _as_it_is(monkeypatch):
    """The test's JAX has its devices already."""
    monkeypatch.setattr("mixtral_jax.plan.__main__.simulate", lambda num_devices: None)


def run(*argv: str) -> int:
    return cli.run(main, Options, "plan", [*RUN, *argv])


def test_it_holds_what_a_run_would_hold(capsys):
    """The least that plan says is the least that the executor of a loaded model says."""
    assert run("--device-memory", "9MB", "--json", "--quantize", "int8") == 0
    found = json.loads(capsys.readouterr().out)
    lm = mj.load("tiny", offload="experts", device_memory="9MB", quantize="int8")
    assert isinstance(lm.executor, OffloadExecutor)
    least = least_of(lm.executor.compiler, Generating(1, 100, 100))
    assert found["least"] == dataclasses.asdict(least)
    assert found["host_bytes"] == 32 * found["expert_bytes"] == 32 * least.expert
    room = 9_000_000 - least.total + least.expert
    assert found["resident_experts"] == min(32, room // least.expert)


def test_a_quantized_folder_is_billed_as_it_lies_there(tmp_path, capsys):
    """In its own groups, asked for by name or not; they are not those of the scheme."""
    folder, bills = tmp_path / "q", []
    quantize_checkpoint(EMBEDDED_FOLDER, folder, Recipe(scheme="int4", group_size=32))
    fixed = [word if word != "tiny" else str(folder) for word in RUN]
    for asked in ([], ["--quantize", "int4"]):
        more = ["--dtype", "float32", "--device-memory", "9MB", "--json", *asked]
        assert cli.run(main, Options, "plan", [*fixed, *more]) == 0
        bills.append(json.loads(capsys.readouterr().out))
    assert bills[0] == bills[1]
    assert bills[0]["quantize"] == "int4"
    lm = mj.load(folder, offload="experts", device_memory="9MB", dtype="float32")
    assert isinstance(lm.executor, OffloadExecutor)
    least = least_of(lm.executor.compiler, Generating(1, 100, 100))
    assert bills[0]["least"] == dataclasses.asdict(least)
    assert bills[0]["host_bytes"] == 32 * least.expert


def test_times_follow_from_hits_and_bandwidth(capsys):
    lines = []
    for rate in ("1", "0.5", "0"):
        assert run("--device-memory", "9MB", "--json", "--hit-rate", rate) == 0
        lines.append(json.loads(capsys.readouterr().out))
    all_hit, half, none = lines
    config, link = mj.load("tiny", mesh="1x1").config, DEVICES["h100"].host_bandwidth
    visits = config.num_hidden_layers * config.num_experts_per_tok  # of one token
    assert all_hit["copied_bytes"] == 0
    assert none["copied_bytes"] == 2 * half["copied_bytes"] == visits * none["expert_bytes"]
    assert none["copy_seconds"] == none["copied_bytes"] / link
    assert all_hit["tokens_per_second"] == 1 / all_hit["device_seconds"]
    assert none["tokens_per_second"] < half["tokens_per_second"] < all_hit["tokens_per_second"]
    assert none["tokens_per_second_overlapped"] == 1 / none["copy_seconds"]


def test_the_case_of_24_gb_by_hand():
    """8x7B with experts in nested NF4; without compiling what it would run."""
    work = workload(Options(model="mixtral-8x7b"))
    parts = plans._parts(work, "nf4-double-quant", "bfloat16")
    D, F, V = 4096, 14336, 32000
    codes = D * F // 2
    scales = D * F // 64
    expert = 3 * (codes + scales + 4 * scales // 256 + 4)
    assert parts.expert_bytes == expert
    assert parts.num_experts == 32 * 8
    heads, keys = D * D, D * 1024

    def packed(size: int) -> int:
        return size // 2 + size // 64 + 4 * (size // 64 // 256) + 4

    layer = 2 * packed(heads) + 2 * packed(keys) + 2 * (2 * D + 8 * D)
    assert parts.device_bytes == 32 * layer + 2 * (2 * V * D + D)
    assert parts.num_experts * expert + parts.device_bytes > 24e9  # it does not fit as a whole
    config = PRESETS["mixtral-8x7b"]
    slots = slot_bucket(config, work.context)
    assert row_bucket(work.batch) * slots * 2 * 8 * 128 * 2 * 32 + parts.device_bytes < 3e9


def test_text(capsys):
    assert run("--device-memory", "9MB") == 0
    shown = capsys.readouterr().out
    assert "of 32, 0.000 GB each" in shown
    assert "uniform routing" in shown
    assert "at the limit" in shown
    assert run("--device-memory", "9MB", "--hit-rate", "0.75") == 0
    assert "hit rate 75.0% (as given)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["--device-memory", "2MB"], BAD_CONFIG, "expected at least"),
        (["--mesh", "1x8"], USAGE, "--mesh with --offload"),
        (["--train", "lora"], USAGE, "--train with --offload"),
        (["--sweep"], USAGE, "--sweep with --offload"),
        (["--hit-rate", "1.5"], USAGE, "from 0 to 1"),
        (["--host-bandwidth", "0"], USAGE, "a positive number"),
        (["--device", "v5e"], USAGE, "--host-bandwidth GB/s"),
        (["--device-memory", "many"], USAGE, "a size like 20GB"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(arguments, code, match, capsys):
    assert run(*arguments) == code
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert match in error


def test_options_of_it_need_it(capsys):
    assert cli.run(main, Options, "plan", ["--model", "tiny", "--hit-rate", "0.5"]) == USAGE
    assert "--hit-rate needs --offload" in capsys.readouterr().err
