"""Options of ``python -m mixtral_jax.finetune``: TRL's and transformers' names and meanings.

The command line, a file of ``--config`` and Python make the same dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mixtral_jax.convert.hub import EMBEDDED
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.finetune.lora import check_targets
from mixtral_jax.load_options import LoadOptions
from mixtral_jax.sharding.cluster import ProcessOptions

Method = Literal["sft", "dpo"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup", "warmup_stable_decay"]
Optimizer = Literal["adamw", "adamw_8bit", "adafactor", "muon"]
ReportTo = Literal["tensorboard", "jsonl", "none"]

# Steps are told to other processes as float32, which is exact up to here.
MOST_STEPS = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What is trained, and how: all that the trainer reads."""

    method: Method = "sft"
    """sft: predict the answers of the data. dpo: prefer the chosen answer of each pair to the
    rejected one (arXiv 2305.18290)."""
    per_device_train_batch_size: int = 8
    """Rows of a device on the axes data and expert, per forward pass. Of dpo: chosen and rejected
    answers are rows of their own."""
    gradient_accumulation_steps: int = 1
    """Forward passes whose gradients make one update."""
    max_length: int = 1024
    """Tokens of a row."""
    packing: bool = False
    """Put several examples into a row; none attends to another."""
    prompt_loss_weight: float = 0.0
    """What a token of a prompt counts in the loss, beside 1 for one of an answer. In evaluation it
    is always 0."""
    seed: int = 42
    """Of the order of the data, the first weights or factors, and dropout."""

    use_peft: bool = False
    """Train low-rank factors (LoRA) beside frozen weights, not the weights themselves."""
    lora_r: int = 16
    """Rank of the factors."""
    lora_alpha: float = 32.0
    """The factors' product is scaled by alpha / r."""
    lora_dropout: float = 0.05
    """Share of the inputs of the factors that is dropped; 0 where experts are targets."""
    lora_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """What gets factors: q_proj, k_proj, v_proj, o_proj; w1, w2, w3 of every expert, or experts for
    the three; gate, the router; all-linear, all of these (peft's means attention alone here)."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732)."""
    freeze_router: bool = False
    """Where all weights train: leave the routers as they are. (With factors a router trains if it
    is a target.)"""
    fsdp: bool = False
    """Where all weights train: share each, and its optimizer state, over the axis data too."""

    learning_rate: float = 2e-5
    """At its highest. 2e-4 is usual for LoRA, 1e-6 for dpo of all weights."""
    lr_scheduler_type: Schedule = "linear"
    """How the learning rate falls after the warm-up, to 0 at the last step or not at all.
    warmup_stable_decay: it stays, and falls in the last --num-decay-steps (arXiv 2404.06395)."""
    num_decay_steps: int | None = None
    """Of warmup_stable_decay: last steps, in which the learning rate falls linearly."""
    warmup_ratio: float = 0.0
    """Share of all steps in which the learning rate rises from 0."""
    warmup_steps: int = 0
    """Or so many steps."""
    optim: Optimizer = "adamw"
    """adamw_8bit keeps its moments in 8 bits (arXiv 2110.02861). muon updates whole matrices of
    attention and experts, with adamw for the rest."""
    weight_decay: float = 0.0
    """Of matrices, not of norms."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the mean of their squares."""
    adam_epsilon: float = 1e-8
    """Added to the root of that mean."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this norm; 0 leaves them."""
    gradient_checkpointing: bool = True
    """Compute the insides of layers again in the backward pass, to keep less in memory."""

    router_aux_loss_coef: float | None = None
    """Of the load-balancing loss; that of the checkpoint's config, if not given. 0 turns it off."""
    aux_loss: Literal["pooled", "per_layer"] = "pooled"
    """pooled: over the tokens of all layers together, as transformers. per_layer: the mean of one
    loss for each layer (arXiv 2101.03961)."""
    router_z_loss_coef: float = 0.0
    """Of the router's z-loss (arXiv 2202.08906)."""

    disable_dropout: bool = True
    """Of dpo: drop nothing, whatever --lora-dropout says."""
    dpo_beta: float = 0.1
    """Of dpo: how strongly the model is held to what it was."""
    label_smoothing: float = 0.0
    """Of dpo: the share of pairs that are taken to be the wrong way round (cDPO)."""

    def __post_init__(self):
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "lora_r"):
            _check(self, name, "at least 1", getattr(self, name) >= 1)
        _check(self, "max_length", "at least 2", self.max_length >= 2)
        _check(self, "seed", "an integer from 0 to 2^31 - 1", 0 <= self.seed < 1 << 31)
        for name in ("lora_alpha", "learning_rate", "adam_epsilon", "dpo_beta"):
            _check(self, name, "a positive number", 0 < getattr(self, name) < math.inf)
        for name in ("weight_decay", "max_grad_norm", "router_z_loss_coef", "warmup_steps"):
            _check(self, name, "0 or more", 0 <= getattr(self, name) < math.inf)
        for name in ("lora_dropout", "adam_beta1", "adam_beta2"):
            _check(self, name, "from 0 to below 1", 0 <= getattr(self, name) < 1)
        for name in ("warmup_ratio", "prompt_loss_weight"):
            _check(self, name, "from 0 to 1", 0 <= getattr(self, name) <= 1)
        _check(self, "label_smoothing", "from 0 to below 0.5", 0 <= self.label_smoothing < 0.5)
        coef = self.router_aux_loss_coef
        _check(self, "router_aux_loss_coef", "0 or more", coef is None or 0 <= coef < math.inf)
        if self.warmup_ratio and self.warmup_steps:
            _refuse("--warmup-ratio with --warmup-steps", fix="choose one")
        self._check_decay()
        if self.prompt_loss_weight and self.method == "dpo":
            _refuse("--prompt-loss-weight is not for dpo", fix="leave it out")
        if self.packing and self.method == "dpo":
            _refuse("--packing is not for dpo: pairs have rows of their own", fix="leave it out")
        if self.use_peft:
            check_targets(self.lora_target_modules, self.dropout)
        if self.use_peft and self.fsdp:
            _refuse(
                "--fsdp shares weights that train, and with --use-peft they are frozen",
                fix="leave it out; a larger expert or tensor axis of --mesh shares them",
            )

    def _check_decay(self) -> None:
        decay = self.num_decay_steps
        _check(self, "num_decay_steps", "at least 1", decay is None or decay >= 1)
        if (self.lr_scheduler_type == "warmup_stable_decay") != (decay is not None):
            what = "--lr-scheduler-type warmup_stable_decay and --num-decay-steps need each other"
            _refuse(what, fix="give both, or neither")

    @property
    def dropout(self) -> float:
        """Of factors, in training."""
        is_off = not self.use_peft or (self.method == "dpo" and self.disable_dropout)
        return 0.0 if is_off else self.lora_dropout


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How long it goes on, and what is saved, measured and told on the way."""

    max_steps: int | None = None
    """Updates in all; by --num-train-epochs, if not given. A larger one goes on from the last
    checkpoint."""
    num_train_epochs: float = 3.0
    """Times that the data is read."""
    save_steps: int = 500
    """Updates from one checkpoint to the next; there is one at the end, too."""
    save_total_limit: int | None = 2
    """Checkpoints that are kept, the newest ones; None keeps all."""
    logging_steps: int = 10
    """Updates that a line of the log covers."""
    report_to: ReportTo = "tensorboard"
    """Where measures go: jsonl, OUTPUT_DIR/metrics.jsonl; tensorboard, event files in
    OUTPUT_DIR/runs as well; none."""
    plot: Path | None = None
    """Draw the curves at the end as FILE.svg or FILE.png (needs matplotlib)."""
    eval_steps: int | None = None
    """Updates from one evaluation to the next; without it only at the end."""
    per_device_eval_batch_size: int | None = None
    """Rows of a device in evaluation; as in training, if not given."""
    sample_steps: int | None = None
    """Updates from one answer to --sample-prompts to the next; without it only at the end."""
    sample_prompts: tuple[str, ...] = ()
    """What the model is asked on the way, greedily; its answers are in the log."""
    sample_max_new_tokens: int = 64
    """Tokens of such an answer."""
    sample_chat: bool = False
    """Ask in the model's own chat format."""

    def __post_init__(self):
        for name in ("save_steps", "logging_steps", "sample_max_new_tokens"):
            _check(self, name, "at least 1", getattr(self, name) >= 1)
        optional = (
            "max_steps",
            "save_total_limit",
            "eval_steps",
            "per_device_eval_batch_size",
            "sample_steps",
        )
        for name in optional:
            value = getattr(self, name)
            _check(self, name, "at least 1", value is None or value >= 1)
        _check(self, "num_train_epochs", "a positive number", 0 < self.num_train_epochs < math.inf)
        if self.max_steps is not None:
            _check(self, "max_steps", f"at most {MOST_STEPS}", self.max_steps <= MOST_STEPS)
        if self.sample_prompts == () and (self.sample_steps is not None or self.sample_chat):
            _refuse("--sample-steps and --sample-chat need --sample-prompts", fix="give some")
        if self.plot is not None and self.report_to == "none":
            _refuse("--plot draws what the log holds", fix="leave out --report-to none")

    def total_steps(self, steps_per_epoch: int) -> int:
        """Updates in all."""
        if self.max_steps is not None:
            return self.max_steps
        return min(math.ceil(self.num_train_epochs * steps_per_epoch), MOST_STEPS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Fine-tunes a Mixtral checkpoint: SFT or DPO, all weights or LoRA, on a mesh.

    Run the same command again after any interruption: it resumes from the newest sound checkpoint
    of OUTPUT_DIR. The result is a PEFT adapter in OUTPUT_DIR itself, or all weights in
    OUTPUT_DIR/model.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[MODEL]")] = EMBEDDED
    """A checkpoint folder, 'tiny', or org/name[@revision] on the Hugging Face Hub."""
    dataset: tuple[str, ...]
    """JSONL and Parquet: files, folders and globs. Columns: messages, or prompt and completion, or
    text; of dpo: chosen and rejected."""
    output_dir: Path
    """The folder for checkpoints, the log and the result."""
    eval_dataset: tuple[str, ...] = ()
    """Data that is not trained on, for the mean loss and the perplexity on the way."""
    config: Path | None = None
    """A TOML or JSON file with any of these options by their names; the command line wins."""
    from_scratch: bool = False
    """Train from random weights, drawn from --seed: of MODEL the config and the tokenizer alone are
    read."""
    load_in_4bit: bool = False
    """Freeze the weights in NF4 (QLoRA): --quantize nf4."""
    load_in_8bit: bool = False
    """Freeze the weights in int8: --quantize int8."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON line about the result on stdout and nothing else there."""
    debug: tyro.conf.FlagCreatePairsOff[bool] = False
    """Show tracebacks."""
    train: tyro.conf.OmitArgPrefixes[TrainOptions] = dataclasses.field(default_factory=TrainOptions)
    run: tyro.conf.OmitArgPrefixes[RunOptions] = dataclasses.field(default_factory=RunOptions)
    load: tyro.conf.OmitArgPrefixes[LoadOptions] = dataclasses.field(default_factory=LoadOptions)
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = dataclasses.field(
        default_factory=ProcessOptions
    )

    def __post_init__(self):
        if not self.dataset:
            _refuse("--dataset names no file", fix="--dataset train.jsonl")
        if self.run.eval_steps is not None and not self.eval_dataset:
            _refuse("--eval-steps needs --eval-dataset", fix="leave it out, or give both")
        self.load.refuse_offload("finetune")
        asked = [name for name, is_asked in self._quantized().items() if is_asked]
        if self.from_scratch:
            self._check_scratch(asked)
        if len(asked) > 1:
            _refuse(" with ".join(asked), fix="choose one")
        if asked and not self.train.use_peft:
            _refuse(f"{asked[0]}: quantized weights are frozen", fix=f"{asked[0]} --use-peft")
        if self.load.adapter is not None and not self.train.use_peft:
            fix = "--use-peft, or merge it first (python -m mixtral_jax.convert --adapter)"
            _refuse("--adapter goes on training factors", fix=fix)

    def _check_scratch(self, quantized: list[str]) -> None:
        """Random weights have nothing to hold on to: all of them train."""
        others = {
            "--use-peft": self.train.use_peft,
            "--adapter": self.load.adapter is not None,
            "--freeze-router": self.train.freeze_router,
            "--method dpo": self.train.method == "dpo",
        }
        for name in [*quantized, *(name for name, is_asked in others.items() if is_asked)]:
            _refuse(f"--from-scratch with {name}, which needs a trained model", fix="leave one out")

    def _quantized(self) -> dict[str, bool]:
        return {
            "--quantize": self.load.quantize is not None,
            "--load-in-4bit": self.load_in_4bit,
            "--load-in-8bit": self.load_in_8bit,
        }

    def load_options(self) -> LoadOptions:
        """How the model is loaded."""
        made = "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else None
        return self.load if made is None else dataclasses.replace(self.load, quantize=made)


def _check(options: Any, name: str, expected: str, is_met: bool) -> None:
    if not is_met:
        flag, got = "--" + name.replace("_", "-"), getattr(options, name)
        raise MixtralError(flag, expected=expected, got=got, fix="choose another", code=USAGE)


def _refuse(what: str, *, fix: str) -> None:
    raise MixtralError(what, fix=fix, code=USAGE)
