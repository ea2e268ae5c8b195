"""The command: exit codes, what is on stdout, and signals. Each run costs seconds, so few."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.errors import BAD_DATA, INTERRUPTED, IO_ERROR, USAGE
from tests.convert import checkpoints

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 60


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mixtral_jax.convert", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_json_is_one_line_alone_on_stdout(tmp_path, original, config):
    done = run(original, tmp_path / "out", "--json", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report) == [
        "parameters",
        "tensors",
        "bytes",
        "seconds",
        "peak_rss_bytes",
        "digest",
    ]
    assert report["bytes"] == 4 * report["parameters"]
    assert done.stderr == ""


def test_bad_data_is_65_and_one_line(tmp_path, config, tensors):
    bad = dict(tensors)
    bad["model.norm.weight"] = np.full_like(bad["model.norm.weight"], np.nan)
    done = run(checkpoints.write(tmp_path / "hf", config, bad), tmp_path / "out")
    assert done.returncode == BAD_DATA
    assert done.stdout == ""
    assert done.stderr.startswith("error: model.norm.weight has NaN")
    assert done.stderr.count("\n") == 1


def test_wrong_usage_is_64(tmp_path):
    assert run(tmp_path, tmp_path / "out", "--dtype", "int8").returncode == USAGE


# A limit on the size of files stands in for a full disk: it needs no mount and no rights.
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
sys.argv = ["convert", *sys.argv[1:]]
import runpy
runpy.run_module("mixtral_jax.convert", run_name="__main__", alter_sys=True)
"""


def test_disk_that_fills_up_is_74_and_one_line(tmp_path, original):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, original, tmp_path / "out"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == IO_ERROR, done.stderr
    assert done.stderr.startswith("error: the disk of ")
    assert done.stderr.count("\n") == 1
    assert run(original, tmp_path / "out").returncode == 0


def started(source: Path, output: Path) -> subprocess.Popen[str]:
    """A conversion that has finished a few leaves, with many to go."""
    process = subprocess.Popen(command(source, output), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    journal = output.with_name(output.name + ".partial") / "journal.jsonl"
    deadline = time.monotonic() + MAX_SECONDS
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    return process


# Before the first leaf: here, while the source is looked for.
WAITING = """
import sys, time
from mixtral_jax import cli
from mixtral_jax.convert import driver
from mixtral_jax.convert.__main__ import Options, main
def resolve(*arguments):
    print("waiting", flush=True)
    time.sleep(60)
driver.resolve = resolve
sys.exit(cli.run(main, Options, "convert", ["org/name", sys.argv[1]]))
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_first_leaf_ends_at_once(tmp_path, sent):
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, tmp_path / "out"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(sent)
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == INTERRUPTED
    assert stderr == "error: interrupted; fix: run the same command again to resume\n"


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGTERM],
        pytest.param([signal.SIGINT], marks=pytest.mark.fault),
        pytest.param([signal.SIGTERM] * 2, marks=pytest.mark.fault),
    ],
)
def test_signal_is_75_and_resumable(tmp_path, small_config, signals):
    config = small_config(num_hidden_layers=8)
    source = checkpoints.write(tmp_path / "hf", config, checkpoints.random_tensors(config))
    process = started(source, tmp_path / "out")
    try:
        for sent in signals:
            process.send_signal(sent)
        _, stderr = process.communicate(timeout=MAX_SECONDS)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == INTERRUPTED, stderr
    lines = stderr.splitlines()
    assert lines[0] == "note: stopping after this leaf; press again to stop now"
    assert lines[1:] == ["error: interrupted; fix: run the same command again to resume"]
    assert not (tmp_path / "out").exists()
    done = run(source, tmp_path / "out")
    assert done.returncode == 0
    assert "note: resuming: " in done.stderr
    assert "digest" in done.stdout
