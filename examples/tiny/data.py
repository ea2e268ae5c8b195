"""Files to evaluate the embedded model with: ``python -m examples.tiny.data FOLDER``.

``questions.jsonl`` holds held-out questions with their answers, ``text.txt`` lines of the kinds
that the model saw without the chat format, drawn anew (their sums and counts are not held out), and
``calibration.jsonl`` text of both kinds to quantize with: conversations of the kind that the model
was trained on, none of them held out, and other lines like those of the text.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from examples.tiny.text import Conversation, Plain, documents, held_out, plain
from mixtral_jax import cli
from mixtral_jax.errors import OK, OUTPUT_EXISTS, USAGE, MixtralError

QUESTIONS, TEXT, CALIBRATION = "questions.jsonl", "text.txt", "calibration.jsonl"
LINES = 20  # of text in one document of the calibration file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes questions.jsonl, text.txt and calibration.jsonl."""

    folder: tyro.conf.Positional[Path]
    """Made if it is not there."""
    per_family: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Questions of each family, where there are so many."""
    lines: int = 1000
    """Of the text."""
    conversations: int = 200
    """Of the calibration file, which has a quarter as many documents of 20 lines of text."""
    seed: int = 0
    """Chooses all."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        check_counts(per_family=self.per_family, lines=self.lines, conversations=self.conversations)


def check_counts(**counts: int) -> None:
    """Refuses options below 1."""
    for name, count in counts.items():
        if count < 1:
            flag = f"--{name.replace('_', '-')}"
            raise MixtralError(flag, expected="1 or more", got=count, code=USAGE)


def write_lines(folder: Path, files: Mapping[str, Sequence[str]]) -> None:
    """Writes files of lines into a folder that has none of them yet; makes it."""
    for name in files:
        if (folder / name).exists():
            fix = "name another folder"
            raise MixtralError(f"{folder / name} exists", fix=fix, code=OUTPUT_EXISTS)
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_json(rows: Iterable[Any]) -> list[str]:
    """A line of JSON for each."""
    return [json.dumps(row, ensure_ascii=False) for row in rows]


def as_row(document: Conversation | Plain) -> dict[str, Any]:
    """A document as a line of JSONL that finetune and quantize --calibration read."""
    if isinstance(document, Plain):
        return {"text": document.text}
    messages = [{"role": "system", "content": document.system}] if document.system else []
    for turn in document.turns:
        messages.append({"role": "user", "content": turn.prompt})
        messages.append({"role": "assistant", "content": turn.answer})
    return {"messages": messages}


def calibration(conversations: int, *, seed: int) -> list[dict[str, Any]]:
    """Conversations, and a quarter as many documents of lines."""
    found = (each for each in documents(seed) if isinstance(each, Conversation))
    rows = [as_row(each) for each in itertools.islice(found, conversations)]
    draw = random.Random(f"calibration {seed}")
    for _ in range(-(-conversations // 4)):
        text = "".join(f"{plain(draw)}\n" for _ in range(LINES))
        rows.append(as_row(Plain(text)))
    draw.shuffle(rows)
    return rows


def main(options: Options) -> int:
    """Writes the files."""
    examples = held_out(options.per_family, seed=options.seed)
    draw = random.Random(f"text {options.seed}")
    texts = [plain(draw) for _ in range(options.lines)]
    rows = calibration(options.conversations, seed=options.seed)
    questions = as_json(example._asdict() for example in examples)
    write_lines(options.folder, {QUESTIONS: questions, TEXT: texts, CALIBRATION: as_json(rows)})
    counts = f"{len(examples)} questions, {len(texts)} lines of text, {len(rows)} documents"
    print(f"{counts} for calibration in {options.folder}")
    return OK


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m examples.tiny.data"))
