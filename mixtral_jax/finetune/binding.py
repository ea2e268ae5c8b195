"""Which options a run is bound to: those that change what is learned.

A run that resumes with another value of one of them would be neither the old run nor a new one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.finetune.options import FinetuneOptions, RunOptions
from mixtral_jax.finetune.scratch import scratch_facts
from mixtral_jax.sharding.agreement import Facts, file_facts, option_facts

# Every option binds but these. How long and where a run goes on, and what it tells on the way:
_OF_THE_RUN = {field.name for field in dataclasses.fields(RunOptions)}
_OF_THE_RUN |= {"config", "output_dir", "json", "peer_timeout"}
# Data and weights are compared by what they hold, not by where they lie.
_BY_CONTENT = {"model", "dataset", "eval_dataset", "adapter"}
# Files beside weights, their configuration and their tokenizer that training does not read.
_IDLE_FILES = {
    f"the file {name}"
    for name in ("generation_config.json", "chat_template.json", "tokenizer_config.json")
}
# Another mesh or kernel computes the same numbers but for their rounding; the rows of a step bind,
# not how many devices share them.
_OF_THE_MACHINE = {
    "mesh",
    "dispatch",
    "attention",
    "kernels",
    "verify",
    "kv_dtype",
    "device_memory",
    "offload",
    "gradient_checkpointing",
    "fsdp",
    "per_device_train_batch_size",
}
_OF_DPO = {"--dpo-beta", "--label-smoothing", "--disable-dropout"}
# Other spellings of --quantize.
_SPELLINGS = {"load_in_4bit", "load_in_8bit"}
_MOST_NAMED = 5
_FREE = {
    name.replace("_", "-") for name in _OF_THE_RUN | _BY_CONTENT | _OF_THE_MACHINE | _SPELLINGS
}


def binding_facts(
    options: FinetuneOptions, *, folder: Path | None, rows: int | None = None
) -> Facts:
    """What a run is bound to, by the name that a person knows it by.

    Args:
        options: of the command.
        folder: of the checkpoint that is trained, to be told apart by its files (as is what
            ``--adapter`` names).
        rows: of a forward pass over all devices, once the mesh is known.
    """
    asked = dataclasses.replace(
        options, load=options.load_options(), load_in_4bit=False, load_in_8bit=False
    )
    found = {f"--{n}": fact for n, fact in option_facts(asked).items() if n not in _FREE}
    if options.train.method != "dpo":
        found = {name: fact for name, fact in found.items() if name not in _OF_DPO}
    if rows is not None:
        found["--per-device-train-batch-size x devices"] = str(rows)
    if folder is not None and options.from_scratch:
        found |= {f"MODEL: {name}": fact for name, fact in scratch_facts(folder).items()}
    elif folder is not None:
        found |= _content("MODEL", folder)
    if options.load.adapter is not None:
        found |= _content("--adapter", Path(options.load.adapter))
    return found


def _content(what: str, folder: Path) -> Facts:
    facts = file_facts(folder).items()
    return {f"{what}: {name}": fact for name, fact in facts if name not in _IDLE_FILES}


def check_bound(saved: Mapping[str, str], now: Mapping[str, str], folder: Path) -> None:
    """Refuses to resume under other options.

    Raises:
        MixtralError: exit code 65, naming every option that differs.
    """
    names = [n for n in dict.fromkeys([*saved, *now]) if saved.get(n) != now.get(n)]
    if not names:
        return
    named = names[:_MOST_NAMED]
    more = f" and {len(names) - len(named)} more" if len(names) > len(named) else ""
    was = "; ".join(f"{name} {saved.get(name, 'absent')}" for name in named) + more
    got = "; ".join(f"{name} {now.get(name, 'absent')}" for name in named) + more
    raise MixtralError(
        f"{folder} was made under other options",
        expected=was,
        got=got,
        fix="give them as before, or choose another --output-dir",
        code=BAD_DATA,
    )
