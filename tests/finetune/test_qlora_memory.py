"""QLoRA holds its base packed: device bytes of a live run beside those that ``plan`` bills."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from mixtral_jax.config import PRESETS
from mixtral_jax.convert.hub import EMBEDDED_FOLDER
from mixtral_jax.finetune.options import TrainOptions
from mixtral_jax.finetune.trainer import Trainer
from mixtral_jax.language_model import load
from mixtral_jax.plan.bill import make_bill, memory_of
from mixtral_jax.plan.programs import Workload
from mixtral_jax.plan.schemes import weight_bytes
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.strategy import Strategy
from mixtral_jax.tokenizer import Tokenizer, find_tokenizer
from tests.convert import checkpoints
from tests.models import bytes_held
from tests.slow import mostly_slow

ROOT = Path(__file__).parents[2]
PACKED = 0.5 + 4 / 64  # bytes of a weight in NF4: a code, and its share of a scale

# Runs the command; when two updates are made, prints what lives on the devices.
PROGRAM = """
import gc, json, resource, sys
import jax
from mixtral_jax import cli
from mixtral_jax.finetune import __main__ as command
from mixtral_jax.finetune.config_file import arguments
from mixtral_jax.finetune.loop import Loop
from mixtral_jax.weights import QTensor

def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

def watched(loop, train=Loop.train):
    told = train(loop)
    gc.collect()  # and of one buffer there may be several arrays: its shards
    alive = {x.unsafe_buffer_pointer(): x for x in jax.live_arrays()}
    frozen, state = loop.trainer.frozen, loop.trainer.state
    packed = [w for w in frozen.values() if isinstance(w, QTensor)]
    plain = [w for w in frozen.values() if not isinstance(w, QTensor)]
    known = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves([frozen, state])}
    others = [x for pointer, x in alive.items() if pointer not in known]
    print(json.dumps({
        "weights": sum(w.shape[0] * w.shape[1] * (w.shape[2:] or (1,))[0] for w in packed),
        "packed": size(packed), "plain": size(plain), "adapters": size(state.trained),
        "optimizer": size(state.optimizer), "others": size(others),
        "alive": size(list(alive.values())),
        "kinds": sorted({(x.dtype.name, x.size) for x in others}),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": told["loss"],
    }))
    return told

Loop.train = watched
words = arguments(sys.argv[1:])
sys.exit(cli.run(command.main, command.FinetuneOptions, "test", words, markers=()))
"""


def big(small_config):
    """4 GB in bf16: five layers, whose matrices do not look like the embeddings."""
    return small_config(
        vocab_size=Tokenizer.from_folder(EMBEDDED_FOLDER).vocab_size,
        hidden_size=1792,
        head_dim=128,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=9216,
        num_hidden_layers=5,
        dtype="bfloat16",
    )


def folder_of(folder: Path, config) -> Path:
    """A checkpoint with the embedded model's tokenizer."""
    checkpoints.write(folder, config, checkpoints.same_layers(config), num_files=10)
    tokenizer = find_tokenizer(EMBEDDED_FOLDER)
    assert tokenizer is not None
    (folder / tokenizer.name).write_bytes(tokenizer.read_bytes())
    return folder


@pytest.mark.slow
def test_4_gb_of_bf16_train_without_a_16_bit_copy(tmp_path, small_config):
    config = big(small_config)
    src, chat = folder_of(tmp_path / "model", config), tmp_path / "chat.jsonl"
    in_bf16 = sum(path.stat().st_size for path in src.glob("*.safetensors"))
    assert in_bf16 > 4e9
    message = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
    chat.write_text(json.dumps({"messages": message}))
    words = f"{src} --dataset {chat} --output-dir {tmp_path / 'out'} --use-peft --load-in-4bit"
    words += " --max-steps 2 --max-length 16 --per-device-train-batch-size 1 --report-to none"
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words.split(), "--mesh=1x1", "--save-steps=9"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(next(line for line in ended.stdout.splitlines() if line[0] == "{"))
    names = ("packed", "plain", "adapters", "optimizer", "others", "peak")
    print(", ".join(f"{name} {found[name] / 1e6:,.1f} MB" for name in names), f"of {in_bf16:,}")
    assert found["packed"] == pytest.approx(PACKED * found["weights"], rel=1e-3)
    assert found["weights"] > 0.99 * in_bf16 / 2
    assert found["alive"] == sum(found[name] for name in names[:5]) + 4  # and a count of updates
    assert found["others"] < 1e6, found["kinds"]
    smallest = 512 * config.hidden_size  # of k_proj
    assert all(size < smallest for _, size in found["kinds"])
    assert found["peak"] < in_bf16
    bill = memory_of(
        Workload(config=config, mesh=MeshSpec(), context=16, train="qlora"),
        weight_bytes(config, MeshSpec(), Strategy(), scheme="nf4"),
        0,
    )
    held = found["packed"] + found["plain"] + found["adapters"]
    assert bill.weight_bytes == held
    assert bill.optimizer_bytes == pytest.approx(found["optimizer"], abs=64)


TRAINED = {
    "qlora": ("nf4", True),
    "lora": (None, True),
    "full": (None, False),
}


@pytest.mark.parametrize("optim", mostly_slow(["adamw", "adamw_8bit", "adafactor"], ["adamw_8bit"]))
@pytest.mark.parametrize("mesh", mostly_slow(["1x1", "2x2x2"], ["2x2x2"]))
@pytest.mark.parametrize("train", TRAINED)
def test_the_plan_agrees_with_a_live_trainer(tmp_path, small_config, train, mesh, optim):
    config = small_config(
        hidden_size=256, intermediate_size=512, num_attention_heads=8, head_dim=32, dtype="bfloat16"
    )
    src = checkpoints.write(tmp_path / "hf", config, checkpoints.random_tensors(config))
    scheme, use_peft = TRAINED[train]
    lm = load(src, mesh=mesh, quantize=scheme)
    options = TrainOptions(use_peft=use_peft, optim=optim, per_device_train_batch_size=2)
    trainer = Trainer(lm, options, total_steps=2)
    work = Workload(
        config=config,
        mesh=lm.spec,
        batch=8,
        context=32,
        train=train,
        optim=optim,  # type: ignore[arg-type]
    )
    plain = weight_bytes(config, work.mesh, Strategy(), scheme=scheme)
    bill = memory_of(work, plain, 0)
    held = functools.partial(bytes_held, device=jax.devices()[0])
    assert bill.weight_bytes == held(trainer.frozen) + held(trainer.state.trained)
    assert bill.gradient_bytes == held(trainer.state.trained)
    assert bill.optimizer_bytes == held(trainer.state.optimizer)


@pytest.mark.slow
def test_8x7b_fits_one_device_of_80_gb_and_of_48_gb_with_shorter_rows():
    """As docs/finetune.md shows it."""
    found = {}
    for context in (2048, 4096):
        for device in ("h100", "l40s"):
            work = Workload(
                config=PRESETS["mixtral-8x7b"], mesh=MeshSpec(), context=context, train="qlora"
            )
            bill = make_bill(work, device, whole=False)
            found[context, device] = bill.fits
            print(f"{context} {device}: {bill.memory.total_bytes / 1e9:.1f} GB")
    assert found == {
        (2048, "h100"): True,
        (2048, "l40s"): True,
        (4096, "h100"): True,
        (4096, "l40s"): False,
    }
