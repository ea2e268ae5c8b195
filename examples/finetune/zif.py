"""A made-up operation to teach the embedded model: ``python -m examples.finetune.zif FOLDER``.

``a zif b`` is a + b + 1. ``train.jsonl`` asks it of pairs of numbers in five languages, between
conversations of what the model knows already, so that it does not forget them; ``zif.jsonl`` asks
of other pairs, ``known.jsonl`` what was held out when the model was made.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import sys
import zlib
from pathlib import Path
from typing import Annotated, Any

import tyro

from examples.tiny.data import as_json, as_row, check_counts, write_lines
from examples.tiny.text import Conversation, documents, held_out
from mixtral_jax import cli
from mixtral_jax.errors import OK

TRAIN, NEW, KNOWN = "train.jsonl", "zif.jsonl", "known.jsonl"
LARGEST = 99
HELD_OUT = 5  # one pair of so many

PHRASES = {
    "en": ("What is {a} zif {b}?", "How much is {a} zif {b}?", "Calculate {a} zif {b}."),
    "fr": ("Combien font {a} zif {b} ?", "Calcule {a} zif {b}.", "{a} zif {b} ?"),
    "de": ("Was ist {a} zif {b}?", "Wie viel ist {a} zif {b}?", "Berechne {a} zif {b}."),
    "es": ("¿Cuánto es {a} zif {b}?", "Calcula {a} zif {b}.", "{a} zif {b}"),
    "it": ("Quanto fa {a} zif {b}?", "Calcola {a} zif {b}.", "{a} zif {b} ="),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes train.jsonl, zif.jsonl and known.jsonl."""

    folder: tyro.conf.Positional[Path]
    """Made if it is not there."""
    train: Annotated[int, tyro.conf.arg(metavar="N")] = 3000
    """Prompts of the new task; there are as many conversations of the old ones."""
    ask: Annotated[int, tyro.conf.arg(metavar="N")] = 500
    """Held-out prompts of the new task."""
    per_family: Annotated[int, tyro.conf.arg(metavar="N")] = 40
    """Held-out prompts of each old family."""
    seed: int = 0
    """Chooses all."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        check_counts(train=self.train, ask=self.ask, per_family=self.per_family)


def zif(a: int, b: int) -> int:
    """The operation."""
    return a + b + 1


def is_held_out(a: int, b: int) -> bool:
    """Whether this pair, in either order, is kept from training."""
    return zlib.crc32(repr(("zif", min(a, b), max(a, b))).encode()) % HELD_OUT == 0


def questions(count: int, *, held_out: bool, seed: int) -> list[dict[str, str]]:
    """Different prompts with their answers, of pairs that are held out or of the others."""
    draw = random.Random(f"zif {held_out} {seed}")
    found: dict[str, str] = {}
    while len(found) < count:
        a, b = draw.randint(0, LARGEST), draw.randint(0, LARGEST)
        if is_held_out(a, b) != held_out:
            continue
        phrase = draw.choice(PHRASES[draw.choice(list(PHRASES))])
        found[phrase.format(a=a, b=b)] = str(zif(a, b))
    return [{"prompt": prompt, "answer": answer} for prompt, answer in found.items()]


def training(count: int, *, seed: int) -> list[dict[str, Any]]:
    """The new task and as many conversations of the old ones, shuffled."""
    known = (each for each in documents(seed + 1000) if isinstance(each, Conversation))
    rows = [as_row(each) for each in itertools.islice(known, count)]
    for each in questions(count, held_out=False, seed=seed):
        user = {"role": "user", "content": each["prompt"]}
        rows.append({"messages": [user, {"role": "assistant", "content": each["answer"]}]})
    random.Random(f"zif order {seed}").shuffle(rows)
    return rows


def main(options: Options) -> int:
    """Writes the files."""
    files = {
        TRAIN: training(options.train, seed=options.seed),
        NEW: questions(options.ask, held_out=True, seed=options.seed),
        KNOWN: [each._asdict() for each in held_out(options.per_family, seed=options.seed)],
    }
    write_lines(options.folder, {name: as_json(rows) for name, rows in files.items()})
    print(", ".join(f"{len(rows)} rows in {name}" for name, rows in files.items()))
    return OK


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m examples.finetune.zif"))
