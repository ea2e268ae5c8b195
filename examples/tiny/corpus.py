"""What the embedded model is trained from: ``python -m examples.tiny.corpus FOLDER``.

``model`` is its configuration and its tokenizer, without weights; ``train.jsonl`` its text, and
``long.jsonl`` more of it with many long conversations. No document comes twice.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from examples.tiny.data import as_row, check_counts
from examples.tiny.text import documents
from examples.tiny.tokens import make_tokenizer
from mixtral_jax import cli
from mixtral_jax.config import PRESETS, config_to_dict
from mixtral_jax.convert.output import new_folder
from mixtral_jax.errors import OK, OUTPUT_EXISTS, MixtralError

MODEL, TRAIN, LONG = "model", "train.jsonl", "long.jsonl"
MARATHONS = 0.3  # of the conversations of several turns in the long text: two thirds of its tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes model, train.jsonl and long.jsonl."""

    folder: tyro.conf.Positional[Path]
    """Made; must not be there."""
    documents: Annotated[int, tyro.conf.arg(metavar="N")] = 250_000
    """Of the text, some 45 tokens each."""
    long_documents: Annotated[int, tyro.conf.arg(metavar="N")] = 16_000
    """Of the long text, some 110 tokens each."""
    seed: int = 0
    """Of the text and of the tokenizer's."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        check_counts(documents=self.documents, long_documents=self.long_documents)


def main(options: Options) -> int:
    """Writes the folder."""
    folder = Path(os.path.abspath(options.folder))
    if folder.exists():
        what = f"{options.folder} exists"
        raise MixtralError(what, fix="name another folder", code=OUTPUT_EXISTS)
    tokenizer = make_tokenizer(options.seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder, 0) as new:
        _write(new, options, tokenizer)
    print(
        f"{options.documents:,} documents and {options.long_documents:,} long ones "
        f"in {options.folder}"
    )
    return OK


def _write(folder: Path, options: Options, tokenizer: bytes) -> None:
    model = folder / MODEL
    model.mkdir()
    config = json.dumps(config_to_dict(PRESETS["tiny"]), indent=2)
    (model / "config.json").write_text(config + "\n", encoding="utf-8")
    (model / "tokenizer.model").write_bytes(tokenizer)
    texts = {
        TRAIN: itertools.islice(documents(options.seed), options.documents),
        LONG: itertools.islice(
            documents(options.seed + 1, marathons=MARATHONS), options.long_documents
        ),
    }
    for name, text in texts.items():
        with open(folder / name, "w", encoding="utf-8") as file:
            for document in text:
                file.write(json.dumps(as_row(document), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m examples.tiny.corpus"))
