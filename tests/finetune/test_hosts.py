"""Two processes train together: they stop at the same step, and resume to the same numbers."""

from __future__ import annotations

import pytest

from mixtral_jax.errors import INTERRUPTED, IO_ERROR, OK
from tests.finetune.fakes import log_of
from tests.sharding import processes

# Trains in OUT over all devices of all processes; process 1 alone gets SIGTERM when STOP steps are
# done; with STOP 0 the disk is full. Prints a digest of the last state.
PROGRAM = """
import hashlib, os, signal, sys
from pathlib import Path
import tyro
from mixtral_jax import cli
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.cluster import ProcessOptions
out, stop_at = Path(sys.argv[1]), int(sys.argv[2])
is_full = stop_at == 0

def main(options):
    hosts.join(options)
    import jax
    from tests.finetune import fakes
    from mixtral_jax.finetune.stop import Stop
    from mixtral_jax.finetune import checkpoints
    if is_full:
        def write_record(*arguments):
            raise OSError(28, "No space left on device")
        checkpoints.write_record = write_record
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), (jax.sharding.AxisType.Auto,))
    def sharding(x):
        return jax.NamedSharding(mesh, jax.P("data") if x.ndim else jax.P())
    def watch(taken):
        if taken == stop_at > 0 and hosts.process_id() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    with Stop() as stop:
        trainer = fakes.FakeTrainer(sharding=sharding)
        one = fakes.loop(
            out, trainer=trainer, stop=stop, batches=fakes.FakeBatches(watch=watch), note=print
        )
        one.train()
    arrays = [x.tobytes() for x in fakes.arrays(hosts.fetch(one.trainer.state))]
    if hosts.is_first():
        print("digest", hashlib.sha256(b"".join(arrays)).hexdigest())
    return 0

sys.exit(cli.run(main, ProcessOptions, "test", sys.argv[3:]))
"""


def train(out, stop_at: int = -1) -> list[processes.Ended]:
    return processes.finish(processes.start(["-c", PROGRAM, str(out), str(stop_at)]))


def digest(ended: list[processes.Ended]) -> str:
    assert [one.code for one in ended] == [OK, OK], [one.stderr for one in ended]
    return ended[0].stdout.split("digest ")[1]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_one_step_and_they_resume(tmp_path):
    whole = digest(train(tmp_path / "whole"))
    ended = train(tmp_path / "out", stop_at=17)
    assert [one.code for one in ended] == [INTERRUPTED, INTERRUPTED], [e.stderr for e in ended]
    (folder,) = {path.name for path in (tmp_path / "out").glob("checkpoint-*")} - {"checkpoint-10"}
    assert folder in ("checkpoint-17", "checkpoint-18")
    assert digest(train(tmp_path / "out")) == whole
    assert log_of(tmp_path / "out") == log_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_first_ends_all_with_74(tmp_path):
    ended = train(tmp_path / "out", stop_at=0)
    assert [one.code for one in ended] == [IO_ERROR, IO_ERROR], [one.stderr for one in ended]
    assert "checkpoint-10 was not saved" in ended[0].stderr
    assert "another process could not save" in ended[1].stderr
