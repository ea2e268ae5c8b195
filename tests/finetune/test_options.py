"""Options: TRL's command lines are understood, nonsense is refused, and what binds a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tyro

from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.finetune import binding
from mixtral_jax.finetune.binding import binding_facts, check_bound
from mixtral_jax.finetune.options import FinetuneOptions, RunOptions, TrainOptions
from mixtral_jax.load_options import LoadOptions
from mixtral_jax.sharding.agreement import option_facts

PUBLISHED = """mistralai/Mixtral-8x7B-v0.1 --dataset chat.jsonl more.parquet --output_dir out
--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --learning_rate 2e-4
--lr_scheduler_type cosine --warmup_ratio 0.03 --max_steps 100 --num_train_epochs 1
--save_steps 50 --save_total_limit 3 --logging_steps 1 --max_length 2048 --packing --use_peft
--lora_r 16 --lora_alpha 32 --lora_target_modules q_proj k_proj v_proj o_proj --load_in_4bit
--gradient_checkpointing --optim adamw --weight_decay 0.1 --max_grad_norm 0.3 --seed 7
--report_to tensorboard"""


def parse(text: str) -> FinetuneOptions:
    return tyro.cli(FinetuneOptions, args=text.split())


def options(**given) -> FinetuneOptions:
    return FinetuneOptions(**{"dataset": ("a.jsonl",), "output_dir": Path("out"), **given})


def test_a_published_command_line_is_understood():
    found = parse(PUBLISHED)
    assert found.model == "mistralai/Mixtral-8x7B-v0.1"
    assert found.dataset == ("chat.jsonl", "more.parquet")
    assert found.train == TrainOptions(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_ratio=0.03,
        max_length=2048,
        packing=True,
        use_peft=True,
        weight_decay=0.1,
        max_grad_norm=0.3,
        seed=7,
    )
    assert found.run == RunOptions(
        max_steps=100, num_train_epochs=1, save_steps=50, save_total_limit=3, logging_steps=1
    )
    assert found.load_options() == LoadOptions(quantize="nf4")


def test_lists_replace_their_defaults_and_flags_can_be_turned_off():
    found = parse(
        "--dataset a --output-dir b --use-peft --lora-target-modules w1 --lora-dropout 0"
        " --no-gradient-checkpointing"
    )
    assert found.train.lora_target_modules == ("w1",)
    assert not found.train.gradient_checkpointing
    assert found.model == "tiny"


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (TrainOptions, {"learning_rate": 0.0}),
        (TrainOptions, {"learning_rate": float("nan")}),
        (TrainOptions, {"lora_r": 0}),
        (TrainOptions, {"lora_dropout": 1.0}),
        (TrainOptions, {"max_length": 1}),
        (TrainOptions, {"seed": -1}),
        (TrainOptions, {"weight_decay": -0.1}),
        (TrainOptions, {"warmup_ratio": 1.5}),
        (TrainOptions, {"prompt_loss_weight": -0.1}),
        (TrainOptions, {"prompt_loss_weight": 1.1}),
        (TrainOptions, {"num_decay_steps": 0}),
        (TrainOptions, {"router_aux_loss_coef": -1.0}),
        (TrainOptions, {"label_smoothing": 0.5}),
        (RunOptions, {"max_steps": 0}),
        (RunOptions, {"save_steps": 0}),
        (RunOptions, {"save_total_limit": 0}),
        (RunOptions, {"num_train_epochs": 0.0}),
        (RunOptions, {"max_steps": 1 << 25}),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(kind, given):
    (name,) = given
    with pytest.raises(MixtralError, match=f"--{name.replace('_', '-')}: expected") as caught:
        kind(**given)
    assert caught.value.code == USAGE


@pytest.mark.parametrize(
    "text",
    [
        "--load-in-4bit",
        "--load-in-4bit --load-in-8bit --use-peft",
        "--quantize int8 --load-in-4bit --use-peft",
        "--eval-steps 5",
        "--sample-steps 5",
        "--adapter folder",
        "--packing --method dpo",
        "--prompt-loss-weight 0.1 --method dpo",
        "--lr-scheduler-type warmup_stable_decay",
        "--num-decay-steps 5",
        "--warmup-ratio 0.1 --warmup-steps 5",
        "--offload experts",
        "--use-peft --fsdp",
        "--use-peft --lora-target-modules foo",
        "--use-peft --lora-target-modules experts",
        "--plot a.svg --report-to none",
    ],
)
def test_options_that_do_not_go_together_are_refused(text, capsys):
    with pytest.raises((MixtralError, SystemExit)):
        parse(f"--dataset a --output-dir b {text}")
    assert "Traceback" not in capsys.readouterr().err


def test_dpo_drops_nothing_unless_asked_to():
    lora = TrainOptions(use_peft=True, lora_dropout=0.1)
    assert lora.dropout == 0.1
    assert TrainOptions(lora_dropout=0.1).dropout == 0
    dpo = dataclasses.replace(lora, method="dpo")
    assert dpo.dropout == 0
    assert dataclasses.replace(dpo, disable_dropout=False).dropout == 0.1
    TrainOptions(use_peft=True, method="dpo", lora_target_modules=("experts",))


def test_no_data_is_refused():
    with pytest.raises(MixtralError, match="--dataset names no file"):
        options(dataset=())


def test_steps_are_those_asked_for_or_of_the_epochs():
    assert RunOptions(max_steps=7).total_steps(100) == 7
    assert RunOptions(num_train_epochs=1.5).total_steps(5) == 8


def test_every_option_either_binds_a_run_or_is_known_to_be_free():
    """A misspelt name would bind; one that is no option is seen here."""
    names = set(option_facts(options()))
    assert names >= binding._FREE
    assert "--learning-rate" in binding_facts(options(), rows=8, folder=None)


def facts(folder: Path | None = None, rows: int = 8, **given) -> dict[str, str]:
    return binding_facts(options(**given), rows=rows, folder=folder)


def check(saved: dict[str, str], now: dict[str, str]) -> None:
    check_bound(saved, now, Path("out/checkpoint-3"))


def test_free_options_may_change_and_others_are_named():
    check(facts(), facts(run=RunOptions(max_steps=9, save_steps=1), model="elsewhere"))
    check(facts(), facts(load=LoadOptions(mesh="1x8"), output_dir=Path("b")))
    check(facts(train=TrainOptions(per_device_train_batch_size=1)), facts())
    lora = TrainOptions(use_peft=True)
    nf4 = LoadOptions(quantize="nf4")
    check(facts(load_in_4bit=True, train=lora), facts(load=nf4, train=lora))
    for field in dataclasses.fields(TrainOptions):
        if field.name.replace("_", "-") in binding._FREE:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if flag in binding._OF_DPO:
            assert flag not in facts()
            assert flag in facts(train=TrainOptions(method="dpo"))
        with pytest.raises(MixtralError, match=flag) as caught:
            check(facts(), {**facts(), flag: "another"})
        assert caught.value.code == BAD_DATA


def test_the_rows_of_a_step_and_the_weights_bind(tmp_path):
    with pytest.raises(MixtralError, match=r"devices 8, got .* devices 4"):
        check(facts(rows=8), facts(rows=4))
    (tmp_path / "config.json").write_text("{}")
    before = facts(folder=tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    with pytest.raises(MixtralError, match=r"MODEL: the file config\.json"):
        check(before, facts(folder=tmp_path))


def test_another_adapter_to_begin_with_is_refused_and_idle_files_may_change(tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for folder in (model, adapter):
        folder.mkdir()
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(b"one")
    given = {
        "folder": model,
        "load": LoadOptions(adapter=str(adapter)),
        "train": TrainOptions(use_peft=True),
    }
    before = facts(**given)
    (model / "generation_config.json").write_text("{}")
    check(before, facts(**given))
    weights.write_bytes(b"two")
    with pytest.raises(MixtralError, match="--adapter: the file adapter_model") as caught:
        check(before, facts(**given))
    assert caught.value.code == BAD_DATA
    with pytest.raises(MixtralError, match="--adapter: the file"):
        check(before, facts(folder=model, train=TrainOptions(use_peft=True)))
