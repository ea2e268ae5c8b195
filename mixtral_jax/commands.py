"""What commands there are: their names, what they are for, and examples. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

PROGRAM = "mixtral-jax"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verb:
    """One command.

    Attributes:
        group: the heading under which it stands in the list of all.
        line: what it is for, in a few words.
        module: has ``run(argv)``, which gives the exit code.
        options: ``module:name`` of the dataclass (or union of them) that its options make.
        examples: what may stand behind its name; shown at the end of its ``--help``.
        has_pairs: whether ``--flag`` has a ``--no-flag`` beside it, as TRL's options have.
    """

    group: str
    line: str
    module: str
    options: str
    examples: tuple[str, ...]
    has_pairs: bool = False


VERBS = {
    "sample": Verb(
        group="use a model",
        line="text from a checkpoint, on a mesh; --interactive talks",
        module="mixtral_jax.sample",
        options="mixtral_jax.sample:Options",
        examples=(
            '--chat --prompt "12+30=" --show-experts',
            'mixtral-orbax/ --mesh 1x8 --chat --prompt "Why is the sky blue?"',
            "mixtral-orbax/ --mesh 1x8 --interactive --quantize nf4",
        ),
    ),
    "serve": Verb(
        group="use a model",
        line="the HTTP APIs of TGI and OpenAI, and a chat page",
        module="mixtral_jax.serve.__main__",
        options="mixtral_jax.serve.options:ServeOptions",
        examples=(
            "tiny --port 3000",
            "mixtral-orbax/ --num-shard 8 --max-total-tokens 4096",
            "mixtral-orbax/ --hostname 0.0.0.0 --api-key-file keys.txt --json-output",
        ),
    ),
    "export": Verb(
        group="use a model",
        line="serialized programs, and a loader without this package",
        module="mixtral_jax.export.__main__",
        options="mixtral_jax.export.__main__:Options",
        examples=(
            "tiny deploy/ --platform cpu",
            "mixtral-orbax/ deploy/ --platform cuda --rows 8 --context 4096",
        ),
    ),
    "convert": Verb(
        group="make a checkpoint",
        line="any published layout to Orbax or safetensors; resumes",
        module="mixtral_jax.convert.__main__",
        options="mixtral_jax.convert.__main__:Options",
        examples=(
            "Mixtral-8x7B-Instruct-v0.1/ mixtral-orbax/",
            "mixtral-orbax/ hf/ --format safetensors",
            "mixtral-orbax/ tuned/ --adapter lora/",
        ),
    ),
    "quantize": Verb(
        group="make a checkpoint",
        line="8, 4, 3 or 2 bits, with or without calibration",
        module="mixtral_jax.quantize.__main__",
        options="mixtral_jax.quantize.options:Options",
        examples=(
            "mixtral-orbax/ four-bit/ --scheme nf4 --double-quant",
            "mixtral-orbax/ three-bit/ --scheme gptq --bits 3 --calibration text.jsonl",
        ),
    ),
    "finetune": Verb(
        group="make a checkpoint",
        line="LoRA, QLoRA or all weights; SFT and DPO; TRL's flags",
        module="mixtral_jax.finetune.__main__",
        options="mixtral_jax.finetune.options:FinetuneOptions",
        examples=(
            "mixtral-orbax/ --dataset chat.jsonl --output-dir out --use-peft --load-in-4bit",
            "mixtral-orbax/ --dataset pairs.jsonl --output-dir out --use-peft --method dpo",
            "--config run.toml --max-steps 100",
        ),
        has_pairs=True,
    ),
    "evaluate": Verb(
        group="measure",
        line="perplexity, exact answers, routing; lm-eval's tasks",
        module="mixtral_jax.evaluate.__main__",
        options="mixtral_jax.evaluate.__main__:Options",
        examples=(
            "perplexity mixtral-orbax/ tuned/ --text wiki.test.raw --mesh 1x8",
            "routing mixtral-orbax/ --text wiki.test.raw --html page.html",
            "lm-eval --model_args pretrained=mixtral-orbax/,mesh=1x8 --tasks arc_easy",
        ),
    ),
    "plan": Verb(
        group="measure",
        line="memory, traffic and the limit of speed of a mesh",
        module="mixtral_jax.plan.__main__",
        options="mixtral_jax.plan.__main__:Options",
        examples=(
            "--model mixtral-8x7b --mesh 1x8 --device h100 --batch 64",
            "--model mixtral-8x22b --device h200 --price 3",
            "--model mixtral-8x7b --train qlora --mesh 1x1",
        ),
    ),
    "sharding": Verb(
        group="measure",
        line="where every weight lies, and what it costs a device",
        module="mixtral_jax.sharding.__main__",
        options="mixtral_jax.sharding.__main__:Options",
        examples=("mixtral-8x7b --mesh 1x8", "mixtral-8x22b --mesh 2x4x2 --json"),
    ),
}


def prog(verb: str) -> str:
    """How the verb was called, for its help: by the console script, or by ``python -m``."""
    is_script = Path(sys.argv[0]).stem == PROGRAM
    return f"{PROGRAM} {verb}" if is_script else f"python -m mixtral_jax.{verb}"
