"""Two processes are one program: same tokens and loss, and a lost peer is named (exit code 76)."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mixtral_jax.errors import INTERRUPTED, PEER_LOST, USAGE
from tests.convert import checkpoints
from tests.environ import without_devices
from tests.sharding.processes import ROOT, finish, run, start

SAMPLE = ["-m", "mixtral_jax.sample", "--mesh", "1x8", "--json", "--max-new-tokens", "24"]
ASK = [*SAMPLE, "--prompt-ids", "1,5,9,12", "--num-samples", "3", "--temperature", "1"]

# One gradient step of plain SGD on mesh 1x8, and the loss before and after it.
GRADIENT = """
import sys, jax, jax.numpy as jnp, numpy as np, json
import mixtral_jax as mj
from mixtral_jax.sharding import hosts
def flag(name, cast):
    found = [a.split("=")[1] for a in sys.argv if a.startswith(name + "=")]
    return cast(found[0]) if found else None
mj.join(mj.ProcessOptions(coordinator=flag("--coordinator", str),
        num_processes=flag("--num-processes", int), process_id=flag("--process-id", int)))
lm = mj.load(sys.argv[1], mesh="1x8", dispatch="all_to_all")
tokens = np.random.default_rng(0).integers(0, lm.config.vocab_size, (16, 17)).astype(np.int32)
def loss(model, tokens):
    logits = model(tokens[:, :-1], placement=lm.placement)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1).mean()
@jax.jit
def step(model, tokens):
    value, gradient = jax.value_and_grad(loss)(model, tokens)
    norm = jnp.sqrt(sum((g.astype(jnp.float32) ** 2).sum() for g in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda w, g: w - 0.1 * g, model, gradient), value, norm
model, first, norm = step(lm.model, tokens)
_, second, _ = step(model, tokens)
if hosts.is_first():
    print(json.dumps([float(first), float(norm), float(second)]))
hosts.leave(0)
"""

# Samples slowly, says when it has begun, and where asked falls asleep between two steps.
SLOW = """
import sys, time
asleep = sys.argv.pop(1)
from mixtral_jax import cli, sample
from mixtral_jax.decode.generate import Generation
from mixtral_jax.sharding import hosts
inner, calls = Generation._limits, []
def slowly(self):
    calls.append(1)
    time.sleep(0.5)
    if len(calls) == 3:
        print("sampling", file=sys.stderr, flush=True)
    if len(calls) == 4 and asleep == str(hosts.process_id()):
        time.sleep(1000)
    return inner(self)
Generation._limits = slowly
sys.exit(cli.run(sample.main, sample.Options, "sample"))
"""

# Falls asleep while it loads.
STUCK = """
import sys, time
asleep = sys.argv.pop(1)
from mixtral_jax import cli, sample
from mixtral_jax.sharding import hosts
inner = hosts.barrier
def barrier(name, *arguments, **options):
    if name == "loaded":
        print("sampling", file=sys.stderr, flush=True)
        time.sleep(1000 if asleep == str(hosts.process_id()) else 0)
    return inner(name, *arguments, **options)
hosts.barrier = barrier
sys.exit(cli.run(sample.main, sample.Options, "sample"))
"""

# Process 0 takes its time to print; the other says that it waits for it.
SLOW_TO_PRINT = """
import sys, time
from mixtral_jax import cli, sample
from mixtral_jax.sharding import hosts
inner = hosts.leave
def leave(code):
    if hosts.is_first():
        time.sleep(60)
    print("leaving", file=sys.stderr, flush=True)
    inner(code)
hosts.leave = leave
sys.exit(cli.run(sample.main, sample.Options, "sample"))
"""


def alone(arguments: list[str]) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=without_devices(), capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_config):
    folder = tmp_path_factory.mktemp("hosts")
    config = small_config(num_hidden_layers=1)
    return checkpoints.write(folder / "hf", config, checkpoints.random_tensors(config))


@pytest.fixture(scope="module")
def converted(checkpoint):
    """Converted by two processes, of which one works."""
    folder = checkpoint.parent / "ours"
    first, second = run(["-m", "mixtral_jax.convert", str(checkpoint), str(folder), "--json"])
    report = json.loads(first.stdout)
    command = ["-m", "mixtral_jax.convert", str(checkpoint), str(folder) + "1", "--json"]
    assert report["digest"] == json.loads(alone(command))["digest"]
    assert second.stdout == ""
    return folder


@pytest.mark.parametrize(
    "more",
    [[], pytest.param(["--speculate", "4"], marks=pytest.mark.slow)],
    ids=["plain", "with drafts"],
)
def test_two_processes_sample_what_one_does(converted, more):
    first, second = run([*ASK[:2], str(converted), *ASK[2:], *more])
    got = [json.loads(line) for line in first.stdout.splitlines()]
    want = [json.loads(x) for x in alone([*ASK[:2], str(converted), *ASK[2:]]).splitlines()]
    assert [c["token_ids"] for c in got] == [c["token_ids"] for c in want]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=1e-5)
    assert len(got) == 3
    assert second.stdout == ""


@pytest.mark.slow
def test_two_processes_take_the_same_gradient_step(converted):
    first, _ = run(["-c", GRADIENT, str(converted)])
    got, want = json.loads(first.stdout), json.loads(alone(["-c", GRADIENT, str(converted)]))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert want[2] < want[0]


def refused(processes: list) -> list[str]:
    """The one line of each of them, ended with 64."""
    ended = finish(processes, seconds=60)
    for process in ended:
        assert process.code == USAGE, process.stderr
        assert process.stdout == ""
    return [x for p in ended for x in p.stderr.splitlines() if x.startswith("error: ")]


@pytest.mark.parametrize(
    ("own", "named"),
    [
        (["--prompt=b"], "prompt is ('b',), in process 0 ('a',)"),
        (["--prompt=a", "--max-new-tokens=8"], "max-new-tokens is 8, in process 0 24"),
    ],
)
def test_other_arguments_are_refused_and_named(own, named):
    processes = start([*SAMPLE, "--mesh=1x2"], own={0: ["--prompt=a"], 1: own})
    lines = refused(processes)
    assert len(lines) == 2
    for rank, line in enumerate(lines):
        assert line.startswith(f"error: process {rank}: process 1 does not do what process 0 does:")
        assert named in line


def test_another_checkpoint_is_refused_and_named(small_config, tmp_path_factory):
    """Its sizes are the same, and so is its path on each host."""
    folders, config = [tmp_path_factory.mktemp(f"host{i}") for i in range(2)], small_config()
    for seed, folder in enumerate(folders):
        tensors = checkpoints.random_tensors(config, seed=seed)
        checkpoints.write(folder / "hf", config, tensors)
    script = "import os, sys; from mixtral_jax import cli, sample\n"
    script += "os.chdir(sys.argv.pop()); sys.exit(cli.run(sample.main, sample.Options, 'sample'))"
    ask = ["-c", script, "hf", "--mesh=1x2", "--prompt-ids=1"]
    lines = refused(start(ask, own={rank: [str(f)] for rank, f in enumerate(folders)}))
    assert len(lines) == 2
    for line in lines:
        assert "process 1 does not do what process 0 does: the file model" in line


@pytest.mark.parametrize("call", ["generate(prompt_token_ids=ids)", "logits(ids)"])
def test_python_programs_are_compared_where_they_compute(call):
    flag = GRADIENT[: GRADIENT.index("lm = ")]
    program = f"{flag}ids = [[1, int(sys.argv[-1])]]\nlm = mj.load(mesh='1x2')\n"
    program += f"try:\n  lm.{call}\nexcept mj.MixtralError as error:\n"
    program += "  print('error:', error, file=sys.stderr)\n  hosts.leave(error.code)\n"
    lines = refused(start(["-c", program], own={0: ["5"], 1: ["6"]}))
    assert len(lines) == 2
    for line in lines:
        assert "process 1 does not do what process 0 does: the " in line


def test_a_fault_of_one_ends_all(converted):
    ask = ["--prompt-ids", "1,2", "--mesh", "1x1"]
    processes = start([*SAMPLE[:2], str(converted), *ask])
    ended = finish(processes)
    # A process that is some seconds behind ends by the other's goodbye, before it meets the fault.
    assert 78 in {process.code for process in ended}
    for process in ended:
        line = {
            78: "mesh 1x1: expected all 2 devices of the 2 processes, got 1",
            PEER_LOST: "ended with exit code 78",
        }[process.code]
        assert line in process.stderr


def lose(converted, how: str, rank: int) -> tuple[float, int, str]:
    """Seconds until the survivor ended, its code, and its last line."""
    asleep = str(rank) if how in ("asleep", "loading") else "nobody"
    arguments = [
        "-c",
        STUCK if how == "loading" else SLOW,
        asleep,
        str(converted),
        *SAMPLE[2:-2],
        "--max-new-tokens",
        "4000",
    ]
    arguments += ["--prompt-ids", "1,2,3", "--ignore-eos"]
    processes = start(arguments)
    survivor = processes[1 - rank]
    try:
        for process in processes:
            lines_until(process, "sampling")
        if how == "killed":
            processes[rank].kill()
        if how == "stopped":
            processes[rank].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        _, stderr = survivor.communicate(timeout=60)
        seconds = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    return seconds, survivor.returncode, stderr


def is_named(how: str, rank: int, stderr: str) -> bool:
    fault = {
        "killed": "is gone",
        "stopped": "is silent",
        "asleep": "is stuck after step",
        "loading": "is stuck after 'load': others came to 'loaded'",
    }[how]
    lines = [x for x in stderr.splitlines() if x.startswith(f"error: process {rank} (")]
    return len(lines) == 1 and fault in lines[0]


def lines_until(process: subprocess.Popen, line: str) -> None:
    """Reads what a process says on stderr up to a line."""
    assert process.stderr is not None
    for said in process.stderr:
        if said == f"{line}\n":
            return
    raise AssertionError(f"{line} was not said")


def test_sigterm_ends_a_process_at_once(long_checkpoint):
    """jax's preemption service would swallow it."""
    arguments = ["-c", SLOW, "nobody", str(long_checkpoint), *SAMPLE[2:-2], "--prompt-ids=1"]
    processes = start([*arguments, "--max-new-tokens=4000", "--ignore-eos"])
    try:
        lines_until(processes[1], "sampling")
        processes[1].terminate()
        assert processes[1].wait(10) == -signal.SIGTERM
    finally:
        first = finish(processes, seconds=30)[0]
    assert (first.code, is_named("killed", 1, first.stderr)) == (PEER_LOST, True), first.stderr


def test_an_interrupt_while_waiting_for_the_others_is_one_line(converted):
    processes = start(["-c", SLOW_TO_PRINT, str(converted), "--mesh=1x2", "--prompt-ids=1"])
    try:
        lines_until(processes[1], "leaving")
        time.sleep(0.5)
        processes[1].send_signal(signal.SIGINT)
        assert processes[1].wait(30) == INTERRUPTED
    finally:
        first, second = finish(processes, seconds=60)
    assert "Traceback" not in second.stderr
    assert "error: process 1: interrupted" in second.stderr
    assert "ended with exit code 75" in first.stderr
    assert first.code == PEER_LOST


@pytest.fixture(scope="module")
def long_checkpoint(tmp_path_factory, small_config):
    config = small_config(max_position_embeddings=8192, num_hidden_layers=1)
    folder = tmp_path_factory.mktemp("long")
    return checkpoints.write(folder / "hf", config, checkpoints.random_tensors(config))


@pytest.mark.fault
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_peer_is_named(long_checkpoint, rank):
    seconds, code, stderr = lose(long_checkpoint, "killed", rank)
    assert (code, is_named("killed", rank, stderr)) == (PEER_LOST, True), stderr
    assert seconds < 15


@pytest.mark.fault
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["stopped", "asleep", "loading"])
def test_a_stopped_or_stuck_peer_is_named(long_checkpoint, how, rank):
    seconds, code, stderr = lose(long_checkpoint, how, rank)
    assert (code, is_named(how, rank, stderr)) == (PEER_LOST, True), stderr
    assert seconds < 15
