"""Training killed with SIGKILL, many times: what is left resumes to the unbroken run.

``python -m pytest -m fault tests/finetune/test_kills.py``
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.finetune.checkpoint_record import problem, read_record
from mixtral_jax.finetune.checkpoints import Checkpoints
from mixtral_jax.finetune.metrics import NAME, read_lines
from tests.environ import without_devices
from tests.finetune.fakes import log_of
from tests.finetune.models import make_folder
from tests.kills import run_killed

ROOT = Path(__file__).parents[2]
INTERVAL = 4  # steps from one checkpoint to the next

# Trains in OUT and kills itself without warning at the n-th system event (opening, renaming,
# making, removing), in whatever thread it happens. Writes the last state to OUT.npz.
KILLED = """
out, limit = sys.argv[1], int(sys.argv[2])
from pathlib import Path
import numpy as np
from mixtral_jax.finetune.options import RunOptions
from tests.finetune import fakes
run = RunOptions(
    save_steps=int(sys.argv[3]), save_total_limit=limit,
    logging_steps=3, eval_steps=10, report_to="jsonl",
)
one = fakes.loop(Path(out), run=run)
one.trainer.step(fakes.make_batch(0)); one.trainer = fakes.FakeTrainer()  # compiles
begin()
one.train()
print(events)
np.savez(out + ".npz", *fakes.arrays(one.trainer.state))
"""


def train(out: Path, n: int = -1, limit: int = 3) -> subprocess.CompletedProcess[str]:
    return run_killed(KILLED, n, out, limit, INTERVAL)


def survive(folder: Path, cuts: list[float], limit: int) -> None:
    """Kills one run again and again, each time after a share of an unbroken run's events."""
    whole = train(folder / "whole")
    assert whole.returncode == 0, whole.stderr
    events = int(whole.stdout.split()[-1])
    out, reached, killed = folder / "out", 0, 0
    for cut in cuts:
        done = train(out, max(1, round(cut * events)), limit)
        assert done.returncode in (0, -9), done.stderr
        killed += done.returncode == -9
        # Every listed checkpoint is whole; what is lost began at most one interval before the one
        # that was being written.
        steps = Checkpoints(out, note=lambda line: None).steps()
        assert all(problem(out / f"checkpoint-{step}") is None for step in steps)
        log = out / NAME
        logged = max((line["step"] for line in read_lines(log)), default=0) if log.exists() else 0
        assert max([0, *steps]) >= max(reached, logged // INTERVAL * INTERVAL - INTERVAL)
        reached = max([reached, *steps])
    assert killed > 0
    done = train(out, -1, limit)
    assert done.returncode == 0, done.stderr
    first, second = (np.load(f"{path}.npz") for path in (folder / "whole", out))
    assert first.files == second.files
    for name in first.files:
        assert first[name].tobytes() == second[name].tobytes()
    assert log_of(out) == log_of(folder / "whole")
    assert sorted(path.name for path in out.glob("*.*")) == ["metrics.jsonl"]


@pytest.mark.fault
@pytest.mark.parametrize("cut", [0.02, 0.1, 0.3, 0.6, 0.95])
def test_killed_once_it_resumes_bit_for_bit(tmp_path, cut):
    survive(tmp_path, [cut], limit=3)


@pytest.mark.fault
@pytest.mark.parametrize("limit", [1, 3])
def test_killed_fifteen_times_at_random_it_resumes_bit_for_bit(tmp_path, limit):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    survive(tmp_path, [rng.uniform(0.0, 0.35) for _ in range(15)], limit=limit)


# The command itself, killed when KILL batches were taken.
COMMAND = """
import os, signal, sys
from mixtral_jax.finetune.data.batches import Batches
from mixtral_jax.finetune.__main__ import run
kill, take, taken = int(sys.argv[1]), Batches.__next__, []
def killed(self):
    taken.append(1)
    if len(taken) == kill:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self)
Batches.__next__ = killed
sys.exit(run(sys.argv[2:]))
"""
OPTIONS = """--max-length 16 --per-device-train-batch-size 1 --max-steps 40 --save-steps 6
--use-peft --lora-r 4 --learning-rate 1e-2 --logging-steps 4 --report-to jsonl --debug
--lora-target-modules q_proj v_proj"""


EIGHT_BITS = "--optim adamw_8bit --lora-r 128"  # factors large enough to have moments in 8 bits


@pytest.mark.fault
@pytest.mark.parametrize(
    ("mesh", "more"), [("1x1", ""), ("1x8", ""), ("1x8", EIGHT_BITS)], ids=["1x1", "1x8", "8 bits"]
)
def test_the_command_killed_at_five_steps_resumes_bit_for_bit(tmp_path, small_config, mesh, more):
    """With dropout, so that random numbers count too."""
    model, data = make_folder(tmp_path, small_config, num_local_experts=8)

    def finetune(out: str, kill: int) -> int:
        where = f"{model} --dataset {data} --output-dir {tmp_path / out} --mesh {mesh}"
        words = f"{where} {OPTIONS} {more}"
        command = [sys.executable, "-c", COMMAND, str(kill), *words.split()]
        return subprocess.run(command, cwd=ROOT, env=without_devices(), check=False).returncode

    def last(out: str) -> dict[str, str]:
        return dict(read_record(tmp_path / out / "checkpoint-40").files)

    assert finetune("whole", -1) == 0
    for kill in (3, 11, 8, 12, 10):  # of the steps of each start
        assert finetune("out", kill) == -9
    assert finetune("out", -1) == 0
    arrays = {name for name in last("whole") if "/optimizer." in name or "/trained." in name}
    assert len(arrays) > 10
    assert any("codes" in name for name in arrays) == bool(more)
    assert all(last("out")[name] == last("whole")[name] for name in arrays)
    assert log_of(tmp_path / "out") == log_of(tmp_path / "whole")
