"""Token ids are those of the chat format, and the vocabulary is made by its script."""

from __future__ import annotations

import collections
import itertools
import json
from importlib.metadata import version
from pathlib import Path

import pytest

from examples.tiny import tokens
from examples.tiny.text import Conversation, Example, Plain, documents
from mixtral_jax.chat import encode_chat
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.tokenizer import Tokenizer

RESULTS = Path(tokens.__file__).parent / "results"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED_FOLDER)


def some(count: int, seed: int = 2) -> list[Conversation | Plain]:
    return list(itertools.islice(documents(seed), count))


def messages(conversation: Conversation) -> list[dict[str, str]]:
    system = [{"role": "system", "content": conversation.system}] if conversation.system else []
    turns = [
        {"role": role, "content": content}
        for turn in conversation.turns
        for role, content in (("user", turn.prompt), ("assistant", turn.answer))
    ]
    return [*system, *turns]


def test_conversations_are_encoded_as_the_chat_does(tokenizer):
    seen = collections.Counter()
    for document in some(400):
        if isinstance(document, Conversation):
            chat = encode_chat(tokenizer, messages(document), continue_final_message=True)
            assert tokens.encode(document, tokenizer).token_ids == [*chat, tokenizer.eos_id]
            seen[bool(document.system), len(document.turns) > 1] += 1
    assert len(seen) == 4, "with and without a system text, one turn and more"


def test_answers_are_marked(tokenizer):
    turn = Example("sum", "en", "12+30=", "42")
    ids, is_answer = tokens.encode(Conversation((turn, turn)), tokenizer)
    answer = [*tokenizer.encode("42", bos=False), tokenizer.eos_id]
    assert list(itertools.compress(ids, is_answer)) == answer * 2
    assert not is_answer[0], "nothing predicts the first token"


def test_vocabulary_is_made_by_its_script(tokenizer):
    made_by = json.loads((RESULTS / "score.json").read_text())["made_by"]
    for name in ("sentencepiece", "num2words"):
        if made_by[name] != version(name):
            pytest.skip(f"made by {name} {made_by[name]}; {version(name)} may divide otherwise")
    made = Tokenizer(tokens.make_tokenizer())
    again = [made.text_of(i) for i in range(made.vocab_size)]
    assert again == [tokenizer.text_of(i) for i in range(tokenizer.vocab_size)]
