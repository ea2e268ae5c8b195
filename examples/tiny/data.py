"""Files to evaluate the embedded model with: ``python -m examples.tiny.data FOLDER``.

``questions.jsonl`` holds held-out questions with their answers, ``text.txt`` lines of the kinds
that the model saw without the chat format, drawn anew (their sums and counts are not held out), and
``calibration.jsonl`` text of both kinds to quantize with: conversations of the kind that the model
was trained on, none of them held out, and other lines like those of the text. Conversations of one
turn lie in a file for each language and for each family of questions, none of them held out, to
compare how they are routed.
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

from examples.tiny.families import FAMILIES
from examples.tiny.language import CODES
from examples.tiny.text import Conversation, Plain, documents, example, held_out, plain
from mixtral_jax import cli
from mixtral_jax.errors import OK, OUTPUT_EXISTS, USAGE, MixtralError

QUESTIONS, TEXT, CALIBRATION = "questions.jsonl", "text.txt", "calibration.jsonl"
LINES = 20  # of text in one document of the calibration file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Writes questions.jsonl, text.txt, calibration.jsonl, language-*.jsonl and family-*.jsonl."""

    folder: tyro.conf.Positional[Path]
    """Made if it is not there."""
    per_family: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Questions of each family, where there are so many."""
    lines: int = 1000
    """Of the text."""
    conversations: int = 200
    """Of the calibration file, which has a quarter as many documents of 20 lines of text."""
    per_group: Annotated[int, tyro.conf.arg(metavar="N")] = 100
    """Conversations of each language, and of each family."""
    seed: int = 0
    """Chooses all."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self):
        names = ("per_family", "lines", "conversations", "per_group")
        check_counts(**{name: getattr(self, name) for name in names})


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


def groups(per_group: int, *, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Conversations of one turn by the name of their file: of each language, of each family."""
    kinds = [("language", code) for code in CODES] + [("family", name) for name in FAMILIES]
    found = {}
    for kind, name in kinds:
        draw = random.Random(f"{kind} {name} {seed}")
        turns = (example(draw, split="train", **{kind: name}) for _ in range(per_group))
        rows = [as_row(Conversation((turn,))) for turn in turns]
        found[f"{kind}-{name}.jsonl"] = rows
    return found


def main(options: Options) -> int:
    """Writes the files."""
    examples = held_out(options.per_family, seed=options.seed)
    draw = random.Random(f"text {options.seed}")
    texts = [plain(draw) for _ in range(options.lines)]
    rows = calibration(options.conversations, seed=options.seed)
    questions = as_json(example._asdict() for example in examples)
    found = groups(options.per_group, seed=options.seed)
    files = {QUESTIONS: questions, TEXT: texts, CALIBRATION: as_json(rows)}
    write_lines(options.folder, files | {name: as_json(each) for name, each in found.items()})
    counts = f"{len(examples)} questions, {len(texts)} lines of text, {len(rows)} documents"
    counts += f" for calibration, {len(found)} files to compare"
    print(f"{counts} in {options.folder}")
    return OK


if __name__ == "__main__":
    sys.exit(cli.run(main, Options, "python -m examples.tiny.data"))
