"""What the embedded model is trained from: ``python -m examples.tiny.corpus FOLDER``.

``model`` is its configuration and its tokenizer, without weights; ``train.jsonl`` its text, of
which no document comes twice; ``long.jsonl`` the long conversations among it, by themselves.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Annotated

import tyro

from examples.tiny.data import as_row, check_counts
from examples.tiny.text import LONGEST_CONVERSATION, Conversation, Plain, documents
from examples.tiny.tokens import make_tokenizer
from mixtral_jax import cli
from mixtral_jax.config import PRESETS, config_to_dict
from mixtral_jax.errors import OK, OUTPUT_EXISTS, MixtralError

MODEL, TRAIN, LONG = "model", "train.jsonl", "long.jsonl"
BESIDE_LONG = 4000  # documents of all lengths, so that short ones are not forgotten


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes model, train.jsonl and long.jsonl."""

    folder: tyro.conf.Positional[Path]
    """Made; must not be there."""
    documents: Annotated[int, tyro.conf.arg(metavar="N")] = 250_000
    """Of the text, some 45 tokens each."""
    seed: int = 0
    """Of the text and of the tokenizer's."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        check_counts(documents=self.documents)


def is_long(document: Conversation | Plain) -> bool:
    """Whether this is one of the few conversations that fill the model's context."""
    return isinstance(document, Conversation) and len(document.turns) > LONGEST_CONVERSATION


def main(options: Options) -> int:
    """Writes the folder."""
    folder, model = options.folder, options.folder / MODEL
    if folder.exists():
        raise MixtralError(f"{folder} exists", fix="name another folder", code=OUTPUT_EXISTS)
    tokenizer = make_tokenizer(options.seed)
    model.mkdir(parents=True)
    config = json.dumps(config_to_dict(PRESETS["tiny"]), indent=2)
    (model / "config.json").write_text(config + "\n", encoding="utf-8")
    (model / "tokenizer.model").write_bytes(tokenizer)
    beside: list[str] = []
    long: list[str] = []
    with open(folder / TRAIN, "w", encoding="utf-8") as train:
        for document in itertools.islice(documents(options.seed), options.documents):
            line = json.dumps(as_row(document), ensure_ascii=False) + "\n"
            train.write(line)
            if len(beside) < BESIDE_LONG:
                beside.append(line)
            if is_long(document):
                long.append(line)
    (folder / LONG).write_text("".join([*beside, *long]), encoding="utf-8")
    print(f"{options.documents:,} documents, {len(long):,} of them long, in {folder}")
    return OK


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m examples.tiny.corpus"))
