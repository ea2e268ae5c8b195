"""Training from scratch: a config and a tokenizer become a model, resumably, on any mesh."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mixtral_jax import cli
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, INTERRUPTED, OK, USAGE, MixtralError
from mixtral_jax.finetune.__main__ import main
from mixtral_jax.finetune.config_file import arguments
from mixtral_jax.finetune.options import FinetuneOptions, TrainOptions
from mixtral_jax.finetune.scratch import fresh_model
from mixtral_jax.finetune.trainer import Trainer
from mixtral_jax.language_model import load
from mixtral_jax.load_options import LoadOptions
from tests.finetune.fakes import log_of, signalled_at_step_three
from tests.finetune.models import make_folder
from tests.finetune.test_trainer import FULL, LENGTH, batch_of, flat, texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_config) -> Path:
    """``model``, a whole checkpoint, ``bare``, its config and tokenizer, and data."""
    folder = tmp_path_factory.mktemp("model")
    made, _ = make_folder(folder, small_config, num_local_experts=2)
    (folder / "bare").mkdir()
    for name in ("config.json", "tokenizer.model"):
        (folder / "bare" / name).write_bytes((made / name).read_bytes())
    return folder


def words(folder: Path, out: Path, *more: str, model: str = "bare") -> list[str]:
    options = "--from-scratch --max-length 16 --no-gradient-checkpointing --save-steps 2"
    options += " --per-device-train-batch-size 2 --report-to jsonl --logging-steps 1"
    options += " --max-steps 4 --learning-rate 1e-2 --prompt-loss-weight 0.5 --json"
    data = ["--dataset", str(folder / "chat.jsonl"), "--output-dir", str(out)]
    return [str(folder / model), *data, *options.split(), *more]


def command(*argv: str) -> int:
    return cli.run(main, FinetuneOptions, "finetune", arguments(argv), markers=())


def digest(out: Path) -> str:
    return json.loads((out / "model" / "manifest.json").read_text())["digest"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, folder) -> Path:
    """What four steps leave, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert command(*words(folder, out)) == OK
    return out


def test_it_begins_with_random_weights_and_leaves_a_model_that_loads(folder, whole):
    lines = log_of(whole)
    lm = load(whole / "model")
    assert lines[0]["loss"] == pytest.approx(np.log(lm.config.vocab_size), abs=0.1)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lm.generate(["1+1="], max_new_tokens=2)[0].token_ids


def test_weights_beside_the_config_are_ignored_and_that_is_said(tmp_path, folder, whole, capsys):
    assert command(*words(folder, tmp_path / "out", model="model")) == OK
    assert digest(tmp_path / "out") == digest(whole)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "random" in line]
    assert line.endswith(f"; the weights in {folder / 'model'} are not read")


def test_a_signal_and_the_same_command_again_make_the_same_model(tmp_path, folder, whole):
    with signalled_at_step_three():
        assert command(*words(folder, tmp_path / "out")) == INTERRUPTED
    assert not (tmp_path / "out" / "model").exists()
    assert command(*words(folder, tmp_path / "out")) == OK
    assert digest(tmp_path / "out") == digest(whole)
    assert log_of(tmp_path / "out") == log_of(whole)


def test_a_checkpoint_binds_to_the_seed_and_the_config(tmp_path, folder, whole, capsys):
    assert command(*words(folder, whole, "--seed", "1")) == BAD_DATA
    assert command(*words(folder, whole, "--no-from-scratch", model="model")) == BAD_DATA
    config = json.loads((folder / "bare" / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    tokenizer = (folder / "bare" / "tokenizer.model").read_bytes()
    (tmp_path / "other" / "tokenizer.model").write_bytes(tokenizer)
    assert command(*words(folder, whole, model=str(tmp_path / "other"))) == BAD_DATA
    err = capsys.readouterr().err
    for named in ("--seed 42, got --seed 1", "--from-scratch True", "MODEL: the file config.json"):
        assert named in err


def test_what_a_folder_lacks_is_told(tmp_path, folder, capsys):
    out = tmp_path / "out"
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).mkdir()
        kept = (folder / "bare" / name).read_bytes()
        (tmp_path / name / name).write_bytes(kept)
        assert command(*words(folder, out, model=str(tmp_path / name))) == INPUT_NOT_FOUND
    assert command(*words(folder, out)[1:], "mistralai/Mixtral-8x7B-v0.1") == INPUT_NOT_FOUND
    err = capsys.readouterr().err
    assert err.count("error: ") == 3
    assert "no tokenizer.model" in err
    assert "no such folder" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "given",
    [
        {"train": TrainOptions(use_peft=True)},
        {"train": TrainOptions(method="dpo")},
        {"train": TrainOptions(freeze_router=True)},
        {"train": TrainOptions(use_peft=True), "load_in_4bit": True},
        {"load": LoadOptions(quantize="int8")},
        {"load": LoadOptions(adapter="a")},
    ],
    ids=["peft", "dpo", "router", "4bit", "quantize", "adapter"],
)
def test_what_needs_a_trained_model_is_refused(given):
    with pytest.raises(MixtralError, match="--") as caught:
        FinetuneOptions(dataset=("a",), output_dir=Path("b"), from_scratch=True, **given)
    assert caught.value.code == USAGE
    FinetuneOptions(dataset=("a",), output_dir=Path("b"), from_scratch=True)


@pytest.mark.parametrize("case", ["1x8", pytest.param("2x2x2 fsdp", marks=pytest.mark.slow)])
def test_every_mesh_trains_the_same_model(tmp_path, folder, small_config, case):
    """Experts as slots here and there, rows and, with fsdp, weights split."""
    mesh, *how = case.split()
    config = json.loads((folder / "bare" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_local_experts": 8}))
    tokenizer = (folder / "bare" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(tokenizer)
    batch = batch_of([[[text] for text in texts(8)]], LENGTH)
    found = []
    for where, fsdp in (("1x1", False), (mesh, "fsdp" in how)):
        asked = LoadOptions(mesh=where, dtype="float32")
        lm = fresh_model(tmp_path, asked, seed=3, fsdp=fsdp)
        rows = 8 // (lm.spec.data * lm.spec.expert)
        options = {**vars(FULL), "per_device_train_batch_size": rows, "fsdp": fsdp}
        trainer = Trainer(lm, TrainOptions(**options), total_steps=3)
        first = flat(trainer.state.trained)
        losses = [float(trainer.step(batch).loss) for _ in range(2)]
        found.append((first, losses, flat(trainer.state.trained)))
    one, many = found
    np.testing.assert_array_equal(one[0], many[0])
    np.testing.assert_allclose(one[1], many[1], rtol=1e-5)
    np.testing.assert_allclose(one[2], many[2], atol=5e-5)
