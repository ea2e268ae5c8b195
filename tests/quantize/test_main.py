"""The command: what it prints, its exit codes, and that a kill costs nothing but time."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import mixtral_jax as mj
from mixtral_jax import cli
from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.driver import JOURNAL_NAME
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.errors import BAD_CONFIG, OK, OUTPUT_EXISTS, USAGE
from mixtral_jax.quantize.__main__ import Options, main
from tests.convert import checkpoints
from tests.kills import run_killed

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> int:
    return cli.run(main, Options, "python -m mixtral_jax.quantize", arguments)


@pytest.fixture
def small(tmp_path, small_config) -> Path:
    config = small_config(hidden_size=64, head_dim=16, num_hidden_layers=2, num_local_experts=2)
    return checkpoints.write(tmp_path / "hf", config, checkpoints.random_tensors(config))


def test_it_prints_coverage_and_errors(tmp_path, small, capfd):
    dst = str(tmp_path / "q")
    arguments = (str(small), dst, "--scheme", "nf4", "--double-quant")
    assert run(*arguments, "--json") == OK
    out = capfd.readouterr().out
    report = json.loads(out)
    assert out.count("\n") == 1
    rows = {row["group"]: row for row in report["coverage"]}
    assert rows["experts"]["scheme"] == "nf4"
    assert rows["experts"]["bits"] == pytest.approx(4.14, abs=0.02)
    assert rows["router"]["scheme"] == "float32"
    assert len(report["errors"]) == 14
    assert all(0.05 < error["relative"] < 0.12 for error in report["errors"].values())
    assert all(
        error["relative"] < error["worst_group"] < 0.3 for error in report["errors"].values()
    )
    assert report["digest"] == read_manifest(tmp_path / "q").digest
    assert report["bytes"] == sum(row["bytes"] for row in report["coverage"])
    assert run(*arguments) == OK
    text = capfd.readouterr()
    assert "is complete already" in text.err
    assert any(line.split()[0] == "experts" for line in text.out.splitlines() if line)
    assert report["digest"] in text.out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--scheme", "int5"), USAGE, "invalid choice"),
        (("--scheme", "int4", "--group-size", "48"), USAGE, "expected 32, 64, 128"),
        (("--scheme", "int4", "--symmetric", "--asymmetric"), USAGE, "choose one"),
        (("--scheme", "int8", "--asymmetric"), USAGE, "not for int8"),
        (("--scheme", "fp8", "--double-quant"), USAGE, "not for fp8"),
        (("--scheme", "nf4", "--format", "gptq"), USAGE, "choose gptq or rtn or int4"),
        (("--scheme", "int4", "--group-size", "128"), BAD_CONFIG, "--group-size 64"),
    ],
)
def test_refusals_are_one_line(tmp_path, small, capfd, options, code, words):
    assert run(str(small), str(tmp_path / "q"), *options) == code
    err = capfd.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "q").exists()


def test_it_writes_the_published_layout(tmp_path, small, capfd):
    dst = tmp_path / "q"
    arguments = (str(small), str(dst), "--scheme", "int4", "--group-size", "32", "--format", "gptq")
    assert run(*arguments, "--json") == OK
    report = json.loads(capfd.readouterr().out)
    assert run(str(small), str(tmp_path / "ours"), "--scheme", "int4", "--group-size", "32") == OK
    assert report["digest"] == read_manifest(tmp_path / "ours").digest
    raw = json.loads((dst / "config.json").read_text())["quantization_config"]
    assert (raw["quant_method"], raw["bits"], raw["group_size"]) == ("gptq", 4, 32)
    tokens = [[1, 5, 9]]
    ours, theirs = (
        mj.load(folder, mesh="1x1", dtype="float32").logits(tokens)
        for folder in (tmp_path / "ours", dst)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "ours", "q"]
    assert run(*arguments) == OUTPUT_EXISTS


KILLED = """
from mixtral_jax.quantize.driver import quantize_checkpoint
from mixtral_jax.quantize.makers import Recipe
begin()
recipe = Recipe(scheme="nf4", double_quant=True)
print(quantize_checkpoint(sys.argv[1], sys.argv[2], recipe).converted.digest, events)
"""


def survive(folder: Path, src: Path, num_kills: int) -> None:
    seed = random.randrange(10**6)
    draw = random.Random(seed)
    whole = run_killed(KILLED, -1, src, folder / "whole")
    assert whole.returncode == 0, whole.stderr
    digest, events = whole.stdout.split()
    was_killed = False
    for _ in range(num_kills):
        killed = run_killed(
            KILLED, draw.randrange(int(events) // 4, int(events)), src, folder / "q"
        )
        if killed.returncode == 0:
            assert killed.stdout.split()[0] == digest, seed
            break
        assert killed.returncode == -signal.SIGKILL, (seed, killed.stderr)
        was_killed = True
    assert was_killed, seed
    done = run_killed(KILLED, -1, src, folder / "q")
    assert done.returncode == 0, (seed, done.stderr)
    assert done.stdout.split()[0] == digest, seed
    assert not (folder / "q.partial").exists()


def test_a_kill_and_a_rerun_give_the_same_digest(tmp_path, small):
    survive(tmp_path, small, num_kills=1)


@pytest.mark.fault
def test_many_kills_and_reruns_give_the_same_digest(tmp_path, small):
    survive(tmp_path, small, num_kills=15)


LARGE = {
    "hidden_size": 1024,
    "head_dim": 64,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 4096,
    "num_hidden_layers": 20,
    "dtype": "bfloat16",
}


@pytest.mark.slow
def test_memory_is_bounded_on_4_gb_and_a_kill_changes_nothing(tmp_path, small_config):
    """Leaves of 67 MB."""
    config = small_config(**LARGE)
    tensors = checkpoints.same_layers(config)
    assert sum(w.nbytes for w in tensors.values()) > 4e9
    src = checkpoints.write(tmp_path / "hf", config, tensors, num_files=20)
    del tensors

    def command(dst: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "mixtral_jax.quantize", src, dst, "--scheme", "nf4", "--json"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def report(run: subprocess.Popen[str]) -> dict:
        out, _ = run.communicate()
        assert run.returncode == OK
        found = json.loads(out)
        largest = 8 * 4096 * 1024 * 2
        print(f"peak {found['peak_rss_bytes'] / 1e6:.0f} MB, {found['seconds']:.0f} s")
        assert found["peak_rss_bytes"] <= 2 * largest + (512 << 20)
        return found

    whole = report(command(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "whole")
    journal, killed = tmp_path / "q.partial" / JOURNAL_NAME, command(tmp_path / "q")
    while not journal.exists() or journal.read_bytes().count(b"\n") < 150:  # of 343 lines
        assert killed.poll() is None
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert report(command(tmp_path / "q"))["digest"] == whole["digest"]
    shutil.rmtree(tmp_path / "q")
    shutil.rmtree(src)


def test_a_quantized_folder_is_converted_as_it_is(tmp_path, small):
    """Another dtype for the weights that are not quantized; codes and scales are copied."""
    assert run(str(small), str(tmp_path / "q"), "--scheme", "int8") == OK
    convert(tmp_path / "q", tmp_path / "half", ConvertOptions(dtype="bfloat16"))
    before, after = (read_manifest(tmp_path / name).leaves for name in ("q", "half"))
    assert before.keys() == after.keys()
    for path, record in before.items():
        assert (record == after[path]) == (".int8." in path), path
