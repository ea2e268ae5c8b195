"""Fifty steps of the command give one loss curve on every mesh, and in two processes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from examples.tiny import data
from mixtral_jax import cli
from mixtral_jax.errors import OK
from mixtral_jax.finetune.__main__ import main
from mixtral_jax.finetune.config_file import arguments
from mixtral_jax.finetune.metrics import NAME, read_lines
from mixtral_jax.finetune.options import FinetuneOptions
from mixtral_jax.language_model import load
from tests.finetune.models import make_folder
from tests.sharding import processes

STEPS, ROWS = 50, 8
TOLERANCE = 1e-4  # nats, in f32, at every step
WEIGHTS = 1e-3  # a learning rate: Adam divides small gradients by their own size

LORA = "--use-peft --lora-r 4 --lora-dropout 0 --lora-target-modules q_proj v_proj experts"
FULL = "--no-use-peft"
CASES = {
    "1x8": (8, ["--mesh=1x8"]),
    "2x4": (8, ["--mesh=2x4"]),
    "fsdp": (8, ["--mesh=8x1", "--fsdp"]),
    "processes": (8, ["--mesh=2x4"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_config):
    """A random model, and conversations and texts of the embedded model's kind."""
    folder = tmp_path_factory.mktemp("curves")
    make_folder(folder, small_config, initializer_range=0.1)
    options = data.Options(folder=folder / "data", per_family=1, lines=1, conversations=1600)
    assert data.main(options) == OK
    return folder


def words(folder, out, how: str, devices: int, *more: str) -> list[str]:
    rate = "1e-2" if how == LORA else "1e-3"
    options = f"--max-length 256 --per-device-train-batch-size {ROWS // devices} --packing"
    options += f" --max-steps {STEPS} --logging-steps 1 --report-to jsonl --learning-rate {rate}"
    data_of = ["--dataset", str(folder / "data" / data.CALIBRATION), "--output-dir", str(out)]
    return [str(folder / "model"), *data_of, *options.split(), *how.split(), *more]


def losses(out) -> np.ndarray:
    found = list(read_lines(out / NAME))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    assert found[-1]["epoch"] <= 1  # no example twice
    return np.array([line["loss"] for line in found])


def curve(folder, out, how: str, case: str | None) -> np.ndarray:
    """The loss of every step."""
    devices, more = (1, ["--mesh=1x1"]) if case is None else CASES[case]
    argv = words(folder, out, how, devices, *more)
    if case == "processes":
        command = ["-m", "mixtral_jax.finetune", *argv]
        ended = processes.finish(processes.start(command, timeout=60), seconds=600)
        assert [one.code for one in ended] == [OK, OK], [one.stderr for one in ended]
    else:
        assert cli.run(main, FinetuneOptions, "finetune", arguments(argv), markers=()) == OK
    return losses(out)


@pytest.mark.slow
@pytest.mark.parametrize("how", [LORA, FULL], ids=["lora", "full"])
def test_every_mesh_draws_the_same_curve(tmp_path, folder, how):
    alone = curve(folder, tmp_path / "alone", how, None)
    assert alone[-10:].mean() < alone[:5].mean() - 0.7
    apart = {}
    for case in CASES:
        if case == "fsdp" and how == LORA:  # shares weights that train
            continue
        apart[case] = np.abs(curve(folder, tmp_path / case, how, case) - alone).max()
        print(f"{case}: at most {apart[case]:.2e} from 1x1")
    print(f"loss {alone[0]:.4f} to {alone[-1]:.4f}")
    if how == FULL:  # what two processes write is one model
        one, two = (load(tmp_path / case / "model") for case in ("alone", "processes"))
        for a, b in zip(jax.tree.leaves(one.model), jax.tree.leaves(two.model), strict=True):
            np.testing.assert_allclose(a, b, atol=WEIGHTS)
    assert max(apart.values()) <= TOLERANCE, apart
