"""Questions with known answers: what counts as right, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

import mixtral_jax as mj
from examples.tiny.text import held_out
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.evaluate.exact import Question, ask, judge, read_questions, score_of
from mixtral_jax.language_model import LanguageModel


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return mj.load("tiny", mesh="1x1")


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return [Question(prompt=e.prompt, answer=e.answer) for e in held_out(2, seed=3)]


@pytest.mark.parametrize(
    ("answer", "text", "is_right", "is_exact"),
    [
        ("42", "42", True, True),
        ("42", " 42", True, True),
        ("42", "42.", True, False),
        ("42", "4", False, False),
        ("42", "So 42", False, False),
        (" 42", " 42", True, True),
        (" 42", "42", False, False),
        ("Rot", "rot", False, False),
        ("42", "", False, False),
    ],
)
def test_judge(answer, text, is_right, is_exact):
    found = judge(Question(prompt="?", answer=answer), text)
    assert (found.is_right, found.is_exact) == (is_right, is_exact)


@pytest.mark.slow
def test_the_embedded_model_answers(lm, questions):
    answers = ask(lm, questions, chat=True).answers
    assert [answer.question for answer in answers] == questions
    score = score_of(answers)
    assert score.asked == len(questions)
    assert score.accuracy >= 0.9
    assert score.exact == score.right  # it ends where the answer does
    again = ask(lm, questions, chat=True, batch=5, max_new_tokens=64).answers
    assert [a.generated_text for a in again] == [a.generated_text for a in answers]


def test_wrong_answers_are_counted(lm, questions):
    wrong = [Question(prompt=q.prompt, answer="a" + q.answer) for q in questions[:4]]
    score = score_of(*ask(lm, wrong, chat=True))
    assert (score.right, score.exact, score.accuracy) == (0, 0, 0.0)


def test_texts_are_continued(lm):
    (answer,) = ask(lm, [Question(prompt="1, 2, 3, 4, 5, 6,", answer="7, 8")]).answers
    assert answer.is_right
    assert answer.generated_text.startswith(" 7, 8")


def test_dropped_assignments_are_counted_once_per_batch(lm, questions, monkeypatch):
    def complete(self: LanguageModel, rows: Any) -> list[Any]:
        answer = SimpleNamespace(error=None, generated_text="", dropped=5)
        return [answer] * 2

    monkeypatch.setattr(LanguageModel, "complete", complete)
    asked = ask(lm, questions[:6], batch=2)
    assert asked.dropped == 15
    assert score_of(*asked).dropped == 15


def test_questions_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"prompt": "¿qué?", "answer": "sí", "family": "x"})
    path.write_text(f"{line}\n\n  \n{line}", encoding="utf-8")
    assert read_questions(path) == [Question(prompt="¿qué?", answer="sí")] * 2


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b'{"prompt": "a", "answer": "b"}\n{', "line 2: expected JSON"),
        (b'\n{"prompt": "a"}', 'line 2: expected a text in "answer"'),
        (b'{"prompt": 1, "answer": "b"}', 'expected a text in "prompt", got 1'),
        (b'{"prompt": "a", "answer": ""}', 'expected a text in "answer"'),
        (b"[1]", 'expected a text in "prompt", got [1]'),
        (b"\xff", "line 1: expected JSON"),
        (b"[" * 100_000, "line 1: expected JSON"),
        (b"\n \n", "expected a line or more"),
    ],
)
def test_bad_lines_are_refused(data, line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(MixtralError) as caught:
        read_questions(tmp_path / "a.jsonl")
    assert caught.value.code == BAD_DATA
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_refusals(lm, questions, tmp_path):
    with pytest.raises(MixtralError) as caught:
        read_questions(tmp_path / "none")
    assert caught.value.code == INPUT_NOT_FOUND
    with pytest.raises(MixtralError) as caught:
        ask(lm, questions, batch=0)
    assert caught.value.code == USAGE
    with pytest.raises(
        MixtralError, match=f"question {len(questions) + 1}: .*within 2048"
    ) as caught:
        ask(lm, [*questions, Question(prompt="1 " * 3000, answer="2")], chat=True)
    assert caught.value.code == USAGE
