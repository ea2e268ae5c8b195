"""Answer tokens by position: the embedded model in long conversations."""

from __future__ import annotations

import pytest

import mixtral_jax as mj
from examples.tiny import positions
from examples.tiny.tokens import encode

pytestmark = pytest.mark.slow


def test_answers_stay_right_where_the_context_is_nearly_full():
    lm = mj.load("tiny", mesh="1x1")
    assert lm.tokenizer is not None
    (conversation,) = positions.long_conversations(1)
    num_answers = sum(encode(conversation, lm.tokenizer).is_answer)
    found = positions.by_position(lm, [conversation])
    assert sum(each["tokens"] for each in found) == num_answers
    assert found[-1]["from"] >= 512
    assert [each["right"] >= 0.95 for each in found] == [True] * len(found)


def test_wrong_answers_are_counted_where_they_stand():
    lm = mj.load("tiny", mesh="1x1")
    (conversation,) = positions.long_conversations(1)
    last = conversation.turns[-1]._replace(answer="zzz")
    worse = conversation._replace(turns=(*conversation.turns[:-1], last))
    before, after = (positions.by_position(lm, [x])[-1]["right"] for x in (conversation, worse))
    assert after < before - 0.01
