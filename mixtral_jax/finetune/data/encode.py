"""Rows to token ids, and which of these are scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.chat import encode_rendered, encode_turns
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.finetune.data.columns import Continuation, Conversation, Text, for_dpo, for_sft
from mixtral_jax.tokenizer import Tokenizer


class Example(NamedTuple):
    """A sequence to learn from, <s> and all.

    ``is_target`` marks the tokens that are predicted and scored; the first never is.
    """

    ids: np.ndarray  # int32 [n]
    is_target: np.ndarray  # bool [n]


class Pair(NamedTuple):
    """Two answers, each behind the same prompt; the answers' tokens are scored."""

    chosen: Example
    rejected: Example


def encode_sft(columns: Mapping[str, Any], tokenizer: Tokenizer) -> Example:
    """A row as supervised fine-tuning reads it (``columns.for_sft``).

    Conversations give the ids that sampling has, and every turn of the assistant is scored, </s>
    included. A continuation begins with the ids that sampling has for its prompt, and ends with
    </s>. A text ends with </s> too; one that begins with "<s>" came out of a chat template, so
    its control pieces are read as such.

    Raises:
        MixtralError: exit code 65 if the row cannot be encoded, or has nothing to score.
    """
    return _encode(for_sft(columns), tokenizer)


def encode_dpo(columns: Mapping[str, Any], tokenizer: Tokenizer) -> Pair:
    """A row as preference optimization reads it (``columns.for_dpo``).

    Raises:
        MixtralError: exit code 65 if the row cannot be encoded, or an answer has nothing to score.
    """
    chosen, rejected = for_dpo(columns)
    return Pair(_encode(chosen, tokenizer), _encode(rejected, tokenizer))


def _encode(form: Conversation | Continuation | Text, tokenizer: Tokenizer) -> Example:
    if isinstance(form, Conversation):
        return _conversation(form, tokenizer)
    if isinstance(form, Continuation):
        if _is_rendered(form.prompt):
            raise MixtralError(
                "prompt",
                expected="a plain text",
                got="one that came out of a chat template (<s>)",
                fix="give messages",
                code=BAD_DATA,
            )
        ids = tokenizer.encode(form.prompt)
        num_prompt = len(ids)
        ids += _behind(form.prompt, form.completion, tokenizer)
    else:
        rendered = _is_rendered(form.text)
        ids = encode_rendered(tokenizer, form.text) if rendered else tokenizer.encode(form.text)
        num_prompt = 1
    # Nothing was written, so nothing is there to learn, not even where it ends.
    if len(ids) > num_prompt and ids[-1] != tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
    return _example(ids, [i >= num_prompt for i in range(len(ids))])


def _conversation(form: Conversation, tokenizer: Tokenizer) -> Example:
    ids, is_target = [tokenizer.bos_id], [False]
    for turn in encode_turns(tokenizer, form.messages, tools=form.tools):
        is_scored = turn.role == "assistant" and turn.message_id >= form.num_prompt
        ids += turn.token_ids
        is_target += [is_scored] * len(turn.token_ids)
    if not any(is_target):
        raise MixtralError(
            "messages",
            expected="an answer of the assistant to learn from",
            got="none",
            fix="add one, or remove the row",
            code=BAD_DATA,
        )
    return _example(ids, is_target)


def _behind(prompt: str, completion: str, tokenizer: Tokenizer) -> list[int]:
    """Ids of a completion that follow those of the prompt, and decode to it behind them.

    Where the prompt's last piece would join with the completion, the completion is encoded behind
    a line end instead. SentencePiece would put a space before a text of its own.
    """
    for before in (prompt, "\n"):
        known = tokenizer.encode(before)
        both = tokenizer.encode(before + completion)
        if both[: len(known)] == known:
            return both[len(known) :]
    return tokenizer.encode(completion, bos=False)


def _is_rendered(text: str) -> bool:
    return text.lstrip().startswith("<s>")


def _example(ids: list[int], is_target: list[bool]) -> Example:
    return Example(np.array(ids, np.int32), np.array(is_target, np.bool_))
