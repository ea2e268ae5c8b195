"""What breaks under a conversion, many times over: kills, full disks, cut and flipped files.

A few of each run always; the long runs: ``python -m pytest -m fault tests/convert/test_faults.py``.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Literal, TypeAlias

import pytest

from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.leaves import PublishedLeaves
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.errors import BAD_DATA, IO_ERROR, MixtralError
from mixtral_jax.model.transformer import leaf_specs
from tests.convert import checkpoints, native
from tests.convert.test_reader import CRAFTED, MAX_SECONDS
from tests.kills import run_killed
from tests.slow import mostly_slow

ROOT = Path(__file__).parents[2]
Format: TypeAlias = Literal["orbax", "safetensors"]
FORMATS: tuple[Format, ...] = ("orbax", "safetensors")
SHARD_SIZE = {"orbax": None, "safetensors": "20KB"}

# Notes each leaf whose writing begins.
KILLED = """
src, dst, format, log = sys.argv[1:]
from mixtral_jax.convert import ConvertOptions, convert
from mixtral_jax.convert.export import SafetensorsOutput
from mixtral_jax.convert.output import OrbaxOutput
log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for kind in (OrbaxOutput, SafetensorsOutput):
    def write(self, leaf, value, write=kind.write):
        os.write(log, leaf.encode() + b"\\n")
        write(self, leaf, value)
    kind.write = write
begin()
size = "20KB" if format == "safetensors" else None
digest = convert(src, dst, ConvertOptions(format=format, max_shard_size=size)).digest
print(digest, events)
"""


def run_and_kill(src: Path, dst: Path, n: int, format: str) -> subprocess.CompletedProcess[str]:
    return run_killed(KILLED, n, src, dst, format, dst.with_name(f"{dst.name}.log"))


def survive(folder: Path, src: Path, config, format: Format, num_kills: int) -> None:
    """Kills one conversion again and again, and compares the end with an unbroken run."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    whole = run_and_kill(src, folder / "whole", -1, format)
    assert whole.returncode == 0, whole.stderr
    digest, events = whole.stdout.split()
    out, killed, finished = folder / "out", 0, 0
    for _ in range(num_kills):
        # Mostly early: a run that resumes has fewer events than the whole one.
        done = run_and_kill(src, out, rng.randrange(1, int(events) // 2), format)
        killed += done.returncode == -9
        assert done.returncode in (0, -9), done.stderr
        if out.exists():  # absent or complete
            options = ConvertOptions(format=format, max_shard_size=SHARD_SIZE[format], verify=True)
            assert convert(src, out, options).digest == digest, f"seed {seed}"
            finished += 1
            shutil.rmtree(out)
    done = run_and_kill(src, out, -1, format)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    assert done.stdout.split()[0] == digest, f"seed {seed}"
    assert killed > 0, f"seed {seed}"
    begun = len((folder / "out.log").read_text().split())
    redone = begun - len(leaf_specs(config)) * (finished + 1)
    assert redone <= killed, f"seed {seed}: {redone} leaves were redone after {killed} kills"
    assert read_manifest(out).leaves == read_manifest(folder / "whole").leaves


@pytest.mark.parametrize("format", mostly_slow(FORMATS, FORMATS[:1]))
def test_killed_at_any_moment_it_resumes_to_the_same_digest(tmp_path, original, config, format):
    survive(tmp_path, original, config, format, num_kills=3)


@pytest.mark.fault
@pytest.mark.parametrize("format", FORMATS)
def test_killed_twenty_times_it_resumes_to_the_same_digest(tmp_path, original, config, format):
    survive(tmp_path, original, config, format, num_kills=20)


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: (folder, resize), where mounting is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kilobytes: int, *options: str) -> int:
        how = ",".join([f"size={kilobytes}k", *options])
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode

    if mount(64) != 0:
        pytest.skip("mounting a disk is not allowed here")
    yield folder, lambda kilobytes: mount(kilobytes, "remount")
    subprocess.run(["umount", str(folder)], check=True)


# Converts as the command line does; with "full" the disk was free when it was asked.
FILLED = """
import sys
from mixtral_jax.convert import preflight, driver
if sys.argv[1] == "full":
    driver.check_disk = lambda *arguments: None
from mixtral_jax import cli
from mixtral_jax.convert.__main__ import Options, main
sys.exit(cli.run(main, Options, "convert", sys.argv[2:]))
"""


def command_line(*arguments: object, when: str = "always") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", FILLED, when, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def assert_one_error(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.fault
@pytest.mark.parametrize("format", FORMATS)
def test_disk_that_is_full_at_six_levels(disk, original, format):
    """Seen before anything is written; and where it fills under way, resumed with more room."""
    folder, resize = disk
    options = ["--format", format]
    resize(1_000_000)
    digest = convert(original, folder / "out", ConvertOptions(format=format)).digest
    room = os.statvfs(folder)
    used = (room.f_blocks - room.f_bfree) * room.f_frsize // 1024  # on that disk, in KiB
    shutil.rmtree(folder / "out")
    for level in (0.02, 0.2, 0.4, 0.6, 0.8, 0.95):
        resize(max(16, int(used * level)))
        done = command_line(original, folder / "out", *options)
        assert_one_error(done, IO_ERROR, "bytes needed", "free", "fix: free")
        assert list(folder.iterdir()) == []
        done = command_line(original, folder / "out", *options, when="full")
        assert_one_error(done, IO_ERROR, "the disk of", "is full", "fix: free space")
        assert not (folder / "out").exists()
        resize(used * 4 + 1000)
        done = command_line(original, folder / "out", *options, when="full")
        assert done.returncode == 0, done.stderr
        assert read_manifest(folder / "out").digest == digest
        shutil.rmtree(folder / "out")


@pytest.fixture
def sharded(tmp_path, config, tensors) -> Path:
    return checkpoints.write(tmp_path / "hf", config, tensors, num_files=2)


def fault_of(folder: Path, config) -> MixtralError | None:
    """What opening finds, within the limits of time."""
    started = time.perf_counter()
    try:
        PublishedLeaves(folder, leaf_specs(config), head_dim=config.head_dim).close()
    except MixtralError as error:
        return error
    finally:
        assert time.perf_counter() - started < MAX_SECONDS
    return None


def truncate(sharded: Path, config, count: int) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    paths = sorted(sharded.glob("*.safetensors"))
    assert fault_of(sharded, config) is None
    for _ in range(count):
        path = rng.choice(paths)
        content = path.read_bytes()
        cut = rng.choice([rng.randrange(len(content)), rng.randrange(200), len(content) - 1])
        path.write_bytes(content[:cut])
        error = fault_of(sharded, config)
        assert error is not None, f"seed {seed}: cut at {cut}"
        assert error.code == BAD_DATA
        assert str(path) in str(error)
        path.write_bytes(content)
    assert fault_of(sharded, config) is None


def flip(sharded: Path, config, count: int) -> Counter:
    """Flips single bits of length and header; counts what came of it."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    path = sorted(sharded.glob("*.safetensors"))[1]
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    metadata = content.index(b'"__metadata__"')
    harmless = range(metadata, content.index(b"}", metadata) + 1)
    outcomes: Counter = Counter()
    for k in range(count):
        position = rng.randrange(8) if k % 10 == 0 else rng.randrange(8, 8 + length)
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        error = fault_of(sharded, config)
        if error is None:
            assert position in harmless or changed[position : position + 1].isspace(), (
                f"seed {seed}: byte {position}"
            )
        else:
            assert error.code == BAD_DATA
            assert str(sharded) in str(error)
        outcomes["noticed" if error else "harmless"] += 1
    path.write_bytes(content)
    assert fault_of(sharded, config) is None
    return outcomes


def test_truncated_shards_are_named(sharded, config):
    truncate(sharded, config, 30)


def test_flipped_bits_of_a_header_are_noticed(sharded, config):
    assert flip(sharded, config, 200)["noticed"] > 150


@pytest.mark.fault
def test_truncated_shards_are_named_at_300_places(sharded, config):
    truncate(sharded, config, 300)


@pytest.mark.fault
def test_2000_flipped_bits_of_a_header_are_noticed(sharded, config):
    assert flip(sharded, config, 2000)["noticed"] > 1500


def test_a_crafted_header_costs_no_memory_to_speak_of(tmp_path, config):
    path = tmp_path / "model.safetensors"
    for name, (content, _) in CRAFTED.items():
        path.write_bytes(content)
        tracemalloc.start()
        try:
            error = fault_of(tmp_path, config)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert error is not None, name
        assert peak < 4_000_000 + 4 * len(content), name


def test_what_an_index_names_elsewhere_is_never_opened(sharded, config, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **k: opened.append(path) or real(path, *rest, **k)
    )
    assert fault_of(sharded, config) is None
    assert len(opened) == 2  # the control: openings are seen
    index = sharded / "model.safetensors.index.json"
    text = index.read_text()
    opened.clear()
    for evil in ("/etc/passwd.safetensors", "../x.safetensors", "a\\u0000b.safetensors"):
        index.write_text(text.replace("model-00001-of-00002.safetensors", evil))
        error = fault_of(sharded, config)
        assert error is not None
        assert error.code == BAD_DATA
    (sharded / "model-00001-of-00002.safetensors").unlink()
    (sharded / "model-00001-of-00002.safetensors").symlink_to("/etc/passwd")
    index.write_text(text)
    error = fault_of(sharded, config)
    assert error is not None
    assert "leaves the checkpoint" in str(error)
    assert opened == []


@pytest.mark.parametrize("layout", ["original", pytest.param("native", marks=pytest.mark.slow)])
def test_the_command_line_tells_every_fault_in_one_line(tmp_path, config, tensors, layout):
    faults = tmp_path / "faults"
    if layout == "original":
        src = checkpoints.write(faults, config, tensors)
        weights = src / "model.safetensors"
    else:
        src = native.write_layout("native", faults, config, tensors)
        weights = src / "consolidated.safetensors"
    content = weights.read_bytes()
    out = tmp_path / "out"
    weights.write_bytes(content[:-1])
    assert_one_error(command_line(src, out), BAD_DATA, weights.name, "fix: ")
    weights.write_bytes(content[:8] + b"[" * 1000 + content[1008:])
    assert_one_error(command_line(src, out), BAD_DATA, weights.name, "JSON", "fix: ")
    weights.rename(src / "consolidated.00.pth")
    assert_one_error(command_line(src, out), BAD_DATA, "is a pickle", "fix: resave", "python -c")
    assert [path.name for path in tmp_path.iterdir()] == ["faults"]
    (src / "consolidated.00.pth").unlink()
    weights.write_bytes(content)
    assert command_line(src, out).returncode == 0
