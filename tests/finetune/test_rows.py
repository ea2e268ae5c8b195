"""Which rows a process brings, on any mesh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mixtral_jax.errors import BAD_CONFIG, OK, MixtralError
from mixtral_jax.finetune.metrics import NAME, read_lines
from mixtral_jax.finetune.options import FinetuneOptions, RunOptions, TrainOptions
from mixtral_jax.finetune.rows import Share, check_pairs, num_rows, part_of, share_of
from mixtral_jax.sharding.mesh import MeshSpec
from tests.finetune.models import make_folder
from tests.sharding import processes


def shares(held: list[set[int]]) -> list[Share]:
    found = dict(enumerate(held))
    return [part_of(found, process_id) for process_id in found]


def test_rows_are_split_where_they_are_and_not_where_processes_hold_the_same():
    assert shares([{0, 1}, {2, 3}]) == [Share(0, 2), Share(1, 2)]
    assert shares([{2, 3}, {0, 1}]) == [Share(1, 2), Share(0, 2)]
    assert shares([{0}, {0}]) == [Share(0, 1)] * 2  # a tensor axis over both
    assert shares([{0}, {0}, {1}, {1}]) == [Share(0, 2)] * 2 + [Share(1, 2)] * 2


@pytest.mark.parametrize("held", [[{0, 1}, {1, 2}], [{0, 1}, {2}]])
def test_rows_that_two_processes_share_in_part_are_refused(held):
    with pytest.raises(MixtralError, match="--mesh") as caught:
        shares(held)
    assert caught.value.code == BAD_CONFIG


@pytest.mark.parametrize("mesh", ["1x1", "2x2x2", "1x1x2"])
def test_one_process_brings_all_rows(mesh):
    spec = MeshSpec.parse(mesh)
    assert share_of(spec.build()) == Share(0, 1)
    assert num_rows(spec, 3) == 3 * spec.data * spec.expert


def test_rows_that_are_no_pairs_are_refused_by_their_flag():
    def check(mesh: str, per_device: int, num_parts: int = 1, evaluation: int | None = None):
        train = TrainOptions(method="dpo", per_device_train_batch_size=per_device)
        run = RunOptions(per_device_eval_batch_size=evaluation)
        asked = FinetuneOptions(dataset=("a",), output_dir=Path("b"), train=train, run=run)
        check_pairs(asked, MeshSpec.parse(mesh), num_parts)

    check("1x8", 1)
    check("1x1", 2)
    with pytest.raises(MixtralError, match="--per-device-train-batch-size: ") as caught:
        check("1x1", 1)
    assert caught.value.code == BAD_CONFIG
    with pytest.raises(MixtralError, match="--per-device-train-batch-size: "):
        check("2x1", 1, num_parts=2)
    with pytest.raises(MixtralError, match="--per-device-eval-batch-size: "):
        check("1x1", 2, evaluation=3)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1x2", "2x1"])
def test_two_processes_train_as_one_whichever_axis_is_between_them(tmp_path, small_config, mesh):
    model, data = make_folder(tmp_path, small_config)
    spec = MeshSpec.parse(mesh)
    words = f"{model} --dataset {data} --mesh {mesh} --max-length 16 --max-steps 4 --use-peft"
    words += " --lora-r 4 --lora-dropout 0 --learning-rate 1e-2 --logging-steps 1"
    words += f" --report-to jsonl --per-device-train-batch-size {4 // num_rows(spec, 1)}"
    words += f" --eval-dataset {data}"

    def train(count: int) -> list[dict]:
        out = tmp_path / f"{count}"
        command = ["-m", "mixtral_jax.finetune", *words.split(), "--output-dir", str(out)]
        started = processes.start(command, count=count, timeout=60)
        assert [one.code for one in processes.finish(started, seconds=300)] == [OK] * count
        return list(read_lines(out / NAME))

    alone, together = train(1), train(2)
    for name in ("loss", "tokens", "grad_norm", "eval_loss"):
        one, two = ([line[name] for line in lines if name in line] for lines in (alone, together))
        np.testing.assert_allclose(one, two, rtol=1e-4, err_msg=name)
