"""How fast does LoRA train, beside a plain loop of transformers and peft on the same weights?

The same random model, factors of the same sizes on the same matrices, the same rows, AdamW; both
in one process, in turn. The peak memory of each is that of a process of its own (``--alone``).

    python benchmarks/finetune.py --layers 4 --json
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import _ours
import numpy as np
from _common import report, run_script, spread

from mixtral_jax.config import ModelConfig
from mixtral_jax.finetune.data.batches import Batch
from mixtral_jax.finetune.options import TrainOptions
from mixtral_jax.finetune.trainer import Trainer
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.placement import MeshPlacement

Side = Literal["ours", "theirs"]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Times updates of LoRA."""

    model: str = "bench"
    """bench (0.79 G parameters), small, or a preset; random weights."""
    layers: int | None = 2
    """Fewer than the model's, to fit beside the peer's."""
    dtype: str = "float32"
    """Of the base and of activations; factors are float32."""
    rows: int = 4
    """Of a batch."""
    length: int = 256
    """Tokens of each row."""
    remat: bool = False
    """Gradient checkpointing, in both."""
    targets: tuple[str, ...] = ATTENTION
    """What gets factors. Others than projections of attention: ours alone."""
    scheme: str | None = None
    """Ours alone, with the base in int8, int4, nf4 or fp8."""
    peer: bool = True
    """Also transformers and peft."""
    rounds: int = 5
    """Updates of each, in turn; the median counts."""
    alone: Side | None = None
    """Run one side and print its peak memory."""
    quick: bool = False
    """The small model and one round: does it still run?"""
    json: bool = False
    """Print one JSON line instead of a table."""


def batch_of(config: ModelConfig, options: Options) -> Batch:
    """Random tokens, all scored."""
    rng = np.random.default_rng(0)
    shape = (1, options.rows, options.length)
    tokens = rng.integers(3, config.vocab_size, shape).astype(np.int32)
    targets = np.roll(tokens, -1, axis=-1)
    weights = np.ones(shape, np.float32)
    weights[..., -1] = 0
    return Batch(tokens, targets, weights, np.ones(shape, np.int32))


def our_step(config: ModelConfig, options: Options, leaves: Any) -> Callable[[], float]:
    """A call that makes an update and gives the loss."""
    if options.scheme is not None or leaves is None:
        model = _ours.random_model(config, options.dtype, options.scheme)
    else:
        from _peer import our_model

        model = our_model(config, leaves, options.dtype)
    spec = MeshSpec.parse("1x1")
    placement = MeshPlacement(spec.build(), kernels=_ours.here().kernels)
    lm = LanguageModel(model, tokenizer=None, placement=placement, spec=spec)
    asked = TrainOptions(
        use_peft=True,
        lora_r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        lora_target_modules=options.targets,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        per_device_train_batch_size=options.rows,
        max_length=options.length,
        gradient_checkpointing=options.remat,
        router_aux_loss_coef=0.0,
        packing=False,
    )
    trainer, batch = Trainer(lm, asked, total_steps=1000), batch_of(config, options)
    return lambda: float(trainer.step(batch).loss)


def their_step(config: ModelConfig, options: Options, leaves: Any) -> Callable[[], float]:
    """The loop that a guide to peft shows, with the faster of two kinds of experts."""
    import _peer
    import peft
    import torch

    model = _peer.their_model(config, leaves, options.dtype)
    model.set_experts_implementation(
        "grouped_mm" if options.rows * options.length >= 64 else "eager"
    )
    if options.remat:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.0, target_modules=list(options.targets)
    )
    adapted = peft.get_peft_model(model, lora).train()
    factors = [p for p in adapted.parameters() if p.requires_grad]
    for factor in factors:
        factor.data = factor.data.float()
    optimizer = torch.optim.AdamW(factors, lr=1e-4, weight_decay=0.0)
    batch = batch_of(config, options)
    tokens = torch.from_numpy(batch.tokens[0].astype(np.int64))
    context = torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16")

    def call() -> float:
        with context:
            loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return call


def peak_of(side: Side, options: Options) -> int:
    """Peak resident bytes of a process that makes two updates of one side."""
    command = [sys.executable, str(Path(__file__)), "--alone", side, "--json"]
    command += ["--targets", *options.targets]
    for name in ("model", "layers", "dtype", "rows", "length", "scheme"):
        value = getattr(options, name)
        if value is not None:
            command += [f"--{name}", str(value)]
    command += ["--remat"] if options.remat else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)["peak_rss_bytes"]


def run_alone(side: Side, config: ModelConfig, options: Options) -> int:
    """Two updates of one side, and the peak on stdout."""
    leaves = None
    if side == "theirs":
        import _peer

        leaves = _peer.random_leaves(config)
    make = our_step if side == "ours" else their_step
    call = make(config, options, leaves)
    del leaves
    for _ in range(2):
        call()
    # Not ru_maxrss: a process that is started inherits that of the one which starts it.
    status = Path("/proc/self/status").read_text()
    peak = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM:")) * 1024
    print(json.dumps({"peak_rss_bytes": peak}))
    return 0


def main(options: Options) -> int:
    """Runs and prints."""
    if options.quick:
        options = dataclasses.replace(options, model="small", rows=2, length=32, rounds=1)
    config = _ours.config_of(options.model, options.layers)
    if options.alone is not None:
        return run_alone(options.alone, config, options)
    calls: dict[Side, Callable[[], float]] = {}
    has_peer = options.peer and options.scheme is None and {*options.targets} <= {*ATTENTION}
    leaves = None
    if has_peer:
        import _peer

        leaves = _peer.random_leaves(config)
        calls["theirs"] = their_step(config, options, leaves)
    calls["ours"] = our_step(config, options, leaves)
    losses, firsts = {}, {}
    for name, call in calls.items():  # compiles, warms up
        start = time.perf_counter()
        losses[name] = call()
        firsts[name] = time.perf_counter() - start
    seconds: dict[Side, list[float]] = {name: [] for name in calls}
    for k in range(options.rounds):
        for name in list(calls)[:: 1 if k % 2 else -1]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    tokens = options.rows * options.length
    rows = [
        {
            "what": name,
            "tok/s": round(tokens / medians[name], 1),
            "spread": spread(seconds[name]),
            "first s": round(firsts[name], 1),
            "first loss": round(losses[name], 5),
            "ratio": round(medians["theirs"] / medians[name], 3) if has_peer else "",
            "peak GB": round(peak_of(name, options) / 1e9, 2),
        }
        for name in calls
    ]
    report(rows, is_json=options.json, **dataclasses.asdict(options))
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main, Options))
