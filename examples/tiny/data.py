"""Files to evaluate the embedded model with: ``python -m examples.tiny.data FOLDER``.

``questions.jsonl`` holds held-out questions with their answers, ``text.txt`` lines of the kinds
that the model saw without the chat format, drawn anew (their sums and counts are not held out).
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Annotated

import tyro

from examples.tiny.text import held_out, plain
from mixtral_jax import cli
from mixtral_jax.errors import OK, OUTPUT_EXISTS, USAGE, MixtralError

QUESTIONS, TEXT = "questions.jsonl", "text.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes questions.jsonl and text.txt."""

    folder: tyro.conf.Positional[Path]
    """Made if it is not there."""
    per_family: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Questions of each family, where there are so many."""
    lines: int = 1000
    """Of the text."""
    seed: int = 0
    """Chooses both."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        for name in ("per_family", "lines"):
            if getattr(self, name) < 1:
                flag, got = f"--{name.replace('_', '-')}", getattr(self, name)
                raise MixtralError(flag, expected="1 or more", got=got, code=USAGE)


def main(options: Options) -> int:
    """Writes both files."""
    for name in (QUESTIONS, TEXT):
        if (options.folder / name).exists():
            fix = "name another folder"
            raise MixtralError(f"{options.folder / name} exists", fix=fix, code=OUTPUT_EXISTS)
    options.folder.mkdir(parents=True, exist_ok=True)
    examples = held_out(options.per_family, seed=options.seed)
    lines = [json.dumps(example._asdict(), ensure_ascii=False) for example in examples]
    draw = random.Random(f"text {options.seed}")
    texts = [plain(draw) for _ in range(options.lines)]
    for name, content in ((QUESTIONS, lines), (TEXT, texts)):
        (options.folder / name).write_text("\n".join(content) + "\n", encoding="utf-8")
    print(f"{len(lines)} questions, {len(texts)} lines of text in {options.folder}")
    return OK


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m examples.tiny.data"))
