"""Questions with known answers: how many does a model answer letter for letter?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.evaluate.text import no_file
from mixtral_jax.language_model import LanguageModel

DEFAULT_BATCH = 128
_SPARE = 16  # tokens beyond the longest right answer that a model may write


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its right answer."""

    prompt: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model wrote to a question, greedily.

    Attributes:
        question: what was asked.
        generated_text: the whole continuation, as written.
        is_right: it begins with the answer.
        is_exact: it is the answer, and nothing more.
    """

    question: Question
    generated_text: str
    is_right: bool
    is_exact: bool


class Asked(NamedTuple):
    """Answers in the order of their questions, and the expert assignments left out on the way, over
    all layers (0 unless overflow="drop").
    """

    answers: list[Answer]
    dropped: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactScore:
    """Right answers of all, and the expert assignments left out (0 unless overflow="drop")."""

    asked: int
    right: int
    exact: int
    dropped: int = 0

    @property
    def accuracy(self) -> float:
        """Share of the questions whose text begins with the answer."""
        return self.right / self.asked


def score_of(answers: Sequence[Answer], dropped: int = 0) -> ExactScore:
    """Counts."""
    return ExactScore(
        asked=len(answers),
        right=sum(answer.is_right for answer in answers),
        exact=sum(answer.is_exact for answer in answers),
        dropped=dropped,
    )


def read_questions(path: str | Path) -> list[Question]:
    """Reads JSON lines with the fields ``prompt`` and ``answer``; other fields are left alone.

    Raises:
        MixtralError: exit code 66 without such a file; 65 for a line that is none of these, with
            its number, or no line at all.
    """
    path = Path(path)
    if not path.is_file():
        what = no_file(path)
        fix = 'name a file of lines like {"prompt": "2+2=", "answer": "4"}'
        raise MixtralError(f"--data {path}: {what}", fix=fix, code=INPUT_NOT_FOUND)
    questions = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                questions.append(_question(line, f"--data {path} line {number}"))
    if not questions:
        raise MixtralError(
            f"--data {path}", expected="a line or more", got="none", fix="add one", code=BAD_DATA
        )
    return questions


def _question(line: bytes, where: str) -> Question:
    fix = '{"prompt": "2+2=", "answer": "4"}'
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):  # bytes that are not UTF-8 are a ValueError too
        got = repr(line[:40].decode(errors="replace"))
        raise MixtralError(where, expected="JSON", got=got, fix=fix, code=BAD_DATA) from None
    for name in ("prompt", "answer"):
        value = found.get(name) if isinstance(found, dict) else None
        if not isinstance(value, str) or not value:
            expected = f'a text in "{name}"'
            got = repr(found if value is None else value)[:60]
            raise MixtralError(where, expected=expected, got=got, fix=fix, code=BAD_DATA)
    return Question(prompt=found["prompt"], answer=found["answer"])


def ask(
    lm: LanguageModel,
    questions: Sequence[Question],
    *,
    chat: bool = False,
    max_new_tokens: int | None = None,
    batch: int = DEFAULT_BATCH,
    watch: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Asked:
    """Asks every question, greedily.

    Texts are compared letter for letter; only where the answer does not begin with a space does one
    before the generated text not count (a continued text has one).

    Args:
        lm: a model with a tokenizer.
        questions: in any order; rows of one batch are of about one length.
        chat: ask in the model's own chat format, each a conversation of its own.
        max_new_tokens: of an answer; those of the longest right answer and 16 more, if None.
        batch: questions asked at a time.
        watch: wraps the batches, to show progress.

    Returns:
        Answers, and how many assignments were dropped.

    Raises:
        MixtralError: exit code 64 for what cannot be asked (a batch below 1, a prompt too long),
            65 where logits are NaN, 66 without a tokenizer.
    """
    if batch < 1:
        raise MixtralError("--batch", expected="at least 1", got=batch, fix="--batch 8", code=USAGE)
    longest = max(len(lm.encode(question.answer)) for question in questions)
    budget = max_new_tokens or longest + _SPARE
    ids = [_encode(lm, question.prompt, chat=chat) for question in questions]
    _check_lengths(ids, budget, lm.config.max_position_embeddings)
    options = SamplingOptions(temperature=0.0, max_new_tokens=budget)
    order = sorted(
        range(len(questions)),
        key=lambda i: (len(questions[i].answer) // 8, len(questions[i].prompt)),
    )
    answers: dict[int, Answer] = {}
    dropped = 0
    for chosen in watch([order[i : i + batch] for i in range(0, len(order), batch)]):
        texts = None if chat else [questions[i].prompt for i in chosen]
        rows = lm.batch([ids[i] for i in chosen], options, prompts=texts, is_answer=chat)
        completions = lm.complete(rows)
        dropped += completions[0].dropped  # of the whole batch
        for i, completion in zip(chosen, completions, strict=True):
            if completion.error:
                what = f"question {i + 1}: {completion.error.partition(': ')[2]}"
                raise MixtralError(what, code=BAD_DATA)
            answers[i] = judge(questions[i], completion.generated_text or "")
    return Asked([answers[i] for i in range(len(questions))], dropped)


def _encode(lm: LanguageModel, prompt: str, *, chat: bool) -> list[int]:
    return lm.encode_chat([{"role": "user", "content": prompt}]) if chat else lm.encode(prompt)


def _check_lengths(ids: Sequence[Sequence[int]], budget: int, longest: int) -> None:
    for i, prompt in enumerate(ids):
        if len(prompt) + budget > longest:
            expected = f"prompt and new tokens within {longest}"
            got, fix = f"{len(prompt)} + {budget}", "shorten the prompt or lower --max-new-tokens"
            raise MixtralError(f"question {i + 1}", expected=expected, got=got, fix=fix, code=USAGE)


def judge(question: Question, generated_text: str) -> Answer:
    """Compares a text with the right answer."""
    text, answer = generated_text, question.answer
    if not answer[0].isspace():
        text = text.lstrip()
    return Answer(
        question=question,
        generated_text=generated_text,
        is_right=text.startswith(answer),
        is_exact=text == answer,
    )
