"""``python -m mixtral_jax.finetune MODEL --dataset FILE --output-dir DIR``: SFT and DPO."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from mixtral_jax import cli
from mixtral_jax.config import ModelConfig, read_config
from mixtral_jax.convert.adapter import Adapter
from mixtral_jax.convert.hub import Source, resolve
from mixtral_jax.errors import INPUT_NOT_FOUND, OK, USAGE, MixtralError
from mixtral_jax.finetune.binding import binding_facts, check_bound
from mixtral_jax.finetune.checkpoints import Checkpoints
from mixtral_jax.finetune.config_file import arguments
from mixtral_jax.finetune.continued import first_factors
from mixtral_jax.finetune.curves import draw_curves
from mixtral_jax.finetune.data.batches import Batches
from mixtral_jax.finetune.data.examples import Examples, load_examples
from mixtral_jax.finetune.loop import Loop
from mixtral_jax.finetune.lora import Pair
from mixtral_jax.finetune.metrics import NAME, check_report_to, read_lines
from mixtral_jax.finetune.options import FinetuneOptions, RunOptions, TrainOptions
from mixtral_jax.finetune.output_folder import OutputFolder
from mixtral_jax.finetune.progress import Machine
from mixtral_jax.finetune.rows import check_pairs, num_rows, share_of
from mixtral_jax.finetune.scratch import fresh_model, scratch_folder
from mixtral_jax.finetune.stop import Stop
from mixtral_jax.finetune.trainer import Trainer
from mixtral_jax.language_model import LanguageModel, load
from mixtral_jax.load_options import load_facts
from mixtral_jax.plan.bill import active_parameters
from mixtral_jax.plan.devices import device_of_kind
from mixtral_jax.plots import check_plot
from mixtral_jax.sharding import hosts
from mixtral_jax.sharding.agreement import Facts
from mixtral_jax.sharding.mesh import MeshSpec, fitted_spec
from mixtral_jax.sharding.placement import MeshPlacement
from mixtral_jax.terminal import note
from mixtral_jax.tokenizer import Tokenizer, find_tokenizer

MODEL = "model"  # in OUTPUT_DIR, where all weights were trained
OF_TRL = {
    "--model-name-or-path": "give the model first, without a flag",
    "--dataset-name": "--dataset and its files",
    "--resume-from-checkpoint": "leave it out: the same command again resumes",
    "--eval-strategy": "--eval-dataset and --eval-steps",
}


def main(options: FinetuneOptions) -> int:
    """Reads all data, loads, trains, and writes the result."""
    start = time.perf_counter()
    hosts.join(options.processes, options)
    check_report_to(options.run.report_to)
    if options.run.plot is not None:
        check_plot(options.run.plot)
    with contextlib.ExitStack() as stack:
        output = OutputFolder(options.output_dir, options)
        if hosts.is_first():
            stack.enter_context(output)
        hosts.barrier("the output folder is ours", may_wait_for_first=True)
        stop = stack.enter_context(Stop())
        checkpoints = Checkpoints(options.output_dir, limit=options.run.save_total_limit, note=note)
        source = _source(options)
        folder = source.folder
        _check_early(checkpoints, binding_facts(options, folder=folder))
        config = read_config(folder, sliding_window=options.load.sliding_window)
        check_pairs(options, _spec(options, config))
        first = _first_factors(options, folder, config)
        examples, evaluated = _read_data(options, folder)
        lm = _model(options, folder)
        per_device = options.train.per_device_train_batch_size
        batches = _batches(options, lm, examples)
        total_steps = options.run.total_steps(batches.steps_per_epoch)
        trainer = Trainer(lm, options.train, total_steps=total_steps, start=first)
        note(f"{trainer.num_trained:,} trained parameters, {total_steps:,} steps")
        loop = Loop(
            trainer=trainer,
            batches=batches,
            run=options.run,
            total_steps=total_steps,
            checkpoints=checkpoints,
            stop=stop,
            bound=binding_facts(options, folder=folder, rows=num_rows(lm.spec, per_device)),
            is_dpo=options.train.method == "dpo",
            evaluation=None if evaluated is None else _evaluation(options, lm, evaluated),
            sample=_sampler(lm, trainer, options.run) if options.run.sample_prompts else None,
            machine=_machine(lm, options.train),
            begun=output.mark if hosts.is_first() else lambda: None,
            note=note,
        )
        told = loop.train()
        result = _write(options, trainer, source.repo)
        hosts.barrier("the result is written", may_wait_for_first=True)
        if hosts.is_first():
            _tell(options, result, told, time.perf_counter() - start)
    return OK


def _source(options: FinetuneOptions) -> Source:
    if options.from_scratch:
        return Source(scratch_folder(options.model))
    return resolve(options.model, note)


def _model(options: FinetuneOptions, folder: Path) -> LanguageModel:
    """What training begins with; what ``--adapter`` names is no part of it."""
    asked = dataclasses.replace(options.load_options(), adapter=None)
    if options.from_scratch:
        seed, fsdp = options.train.seed, options.train.fsdp
        return fresh_model(folder, asked, seed=seed, fsdp=fsdp, note=note)
    fields = {name: getattr(asked, name) for name in asked.__dataclass_fields__}
    return load(options.model, note=note, **fields)


def _check_early(checkpoints: Checkpoints, bound: Facts) -> None:
    """Other options are refused before anything large is read; the loop compares all of them."""
    record = checkpoints.glance()
    if record is not None:
        saved = {name: fact for name, fact in record.saved.options.items() if name in bound}
        check_bound(saved, bound, checkpoints.path(record.saved.step))


def _spec(options: FinetuneOptions, config: ModelConfig) -> MeshSpec:
    """The mesh that ``load`` will make."""
    text = options.load.mesh
    asked = None if text is None else MeshSpec.parse(text)
    return fitted_spec(asked, config, lambda line: None)


def _first_factors(
    options: FinetuneOptions, folder: Path, config: ModelConfig
) -> dict[str, Pair] | None:
    """Those of ``--adapter``, if it is given."""
    if options.load.adapter is None:
        return None
    hosts.agree("adapter", lambda: load_facts(options.load, folder))
    adapter = Adapter(options.load.adapter, config, base=folder)
    for line in adapter.notes:
        note(line)
    return first_factors(adapter, options.train)


def _read_data(options: FinetuneOptions, folder: Path) -> tuple[Examples, Examples | None]:
    """All of it is checked before the model is loaded."""
    if find_tokenizer(folder) is None:
        fix = "copy it from the published checkpoint"
        raise MixtralError(f"{folder} has no tokenizer.model", fix=fix, code=INPUT_NOT_FOUND)
    tokenizer = Tokenizer.from_folder(folder)

    def read(names: tuple[str, ...]) -> Examples:
        method, max_length = options.train.method, options.train.max_length
        found = load_examples(names, tokenizer, max_length=max_length, method=method)
        note(f"{len(found):,} examples, {found.num_targets:,} tokens to predict")
        for line in found.notes():
            note(line)
        return found

    examples = read(options.dataset)
    evaluated = read(options.eval_dataset) if options.eval_dataset else None
    digests = {"the training data": examples.digest}
    if evaluated is not None:
        digests["the data of --eval-dataset"] = evaluated.digest
    hosts.agree("data", lambda: digests)
    return examples, evaluated


def _batches(
    options: FinetuneOptions, lm: LanguageModel, examples: Examples, *, each: int | None = None
) -> Batches:
    """Batches to train with; to evaluate with, ``each`` rows per device at a time."""
    per_device = each or options.train.per_device_train_batch_size
    assert isinstance(lm.placement, MeshPlacement)
    share = share_of(lm.placement.mesh)
    check_pairs(options, lm.spec, share.num_parts)
    return Batches(
        examples,
        rows=num_rows(lm.spec, per_device) // share.num_parts,
        accumulation=options.train.gradient_accumulation_steps if each is None else 1,
        length=options.train.max_length,
        packing=options.train.packing,
        seed=options.train.seed,
        prompt_weight=options.train.prompt_loss_weight if each is None else 0.0,
        part_id=share.part_id,
        num_parts=share.num_parts,
    )


def _evaluation(
    options: FinetuneOptions, lm: LanguageModel, examples: Examples
) -> Callable[[], Any]:
    asked = options.run.per_device_eval_batch_size
    each = asked or options.train.per_device_train_batch_size
    return _batches(options, lm, examples, each=each).once


def _sampler(
    lm: LanguageModel, trainer: Trainer, run: RunOptions
) -> Callable[[], list[dict[str, str]]]:
    def sample() -> list[dict[str, str]]:
        now = LanguageModel(
            trainer.model(),
            tokenizer=lm.tokenizer,
            placement=lm.placement,
            spec=lm.spec,
            folder=lm.folder,
            kv_dtype=lm.kv_dtype,
        )
        how: dict[str, Any] = {"max_new_tokens": run.sample_max_new_tokens, "temperature": 0.0}
        if run.sample_chat:
            asked = ([{"role": "user", "content": prompt}] for prompt in run.sample_prompts)
            answers = [now.chat(messages, **how) for messages in asked]
        else:
            answers = now.generate(list(run.sample_prompts), **how)
        texts = (answer.generated_text or "" for answer in answers)
        pairs = zip(run.sample_prompts, texts, strict=True)
        return [{"prompt": prompt, "text": text} for prompt, text in pairs]

    return sample


def _machine(lm: LanguageModel, options: TrainOptions) -> Machine:
    """Products of a token by formula, as in PaLM (arXiv 2204.02311, appendix B).

    A forward pass takes 2 FLOPs for each weight that a token meets, and 4 H C T per layer in
    attention; a backward pass as many for the gradient of what was multiplied, and as many again
    for that of the weights, which frozen ones do not need.
    """
    config = lm.config
    heads = config.num_attention_heads * config.head_dim
    attention = 12 * config.num_hidden_layers * heads * options.max_length
    passes = 4 if options.use_peft else 6
    devices = lm.spec.num_devices
    device = device_of_kind(jax.devices()[0].device_kind)
    return Machine(
        flops_per_token=float(passes * active_parameters(config) + attention),
        peak_flops=None if device is None else devices * device.flops,
    )


def _write(options: FinetuneOptions, trainer: Trainer, base: str | None) -> Path:
    """The result; a second run of a finished command writes it again."""
    if options.train.use_peft:
        trainer.save_adapter(options.output_dir, base)
        return options.output_dir
    folder = options.output_dir / MODEL
    if hosts.is_first():
        shutil.rmtree(folder, ignore_errors=True)
    hosts.barrier("the old result is gone", may_wait_for_first=True)
    trainer.save_model(folder, note=note)
    return folder


def _tell(options: FinetuneOptions, result: Path, told: dict[str, Any], seconds: float) -> None:
    if options.run.plot is not None:
        draw_curves(options.output_dir / NAME, options.run.plot)
    if not options.json:
        print(f"{'adapter' if options.train.use_peft else 'model'}  {result}")
        return
    log = options.output_dir / NAME  # of a run that had nothing left to do, too
    for line in reversed(list(read_lines(log)) if log.is_file() else []):
        told = {**line, **told}
    names = ("step", "loss", "eval_loss", "eval_perplexity", "num_tokens")
    line = {name: told.get(name) for name in names}
    print(json.dumps({"result": str(result), **line, "seconds": round(seconds, 3)}))


def check_names(argv: Sequence[str]) -> None:
    """Refuses options of TRL's that are spelt in another way here."""
    for word in argv:
        fix = OF_TRL.get(word.partition("=")[0].replace("_", "-"))
        if fix is not None:
            raise MixtralError(f"{word} is an option of TRL", fix=fix, code=USAGE)


def run(argv: Sequence[str]) -> int:
    """Adds what a file of ``--config`` says to the command line, and runs."""
    try:
        check_names(argv)
        words = arguments(argv)
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return cli.run_verb("finetune", main, FinetuneOptions, words)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
