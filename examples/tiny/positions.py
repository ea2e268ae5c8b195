"""Whether answers stay right far into a conversation: shares of answer tokens, by position."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from examples.tiny.text import Conversation, documents
from examples.tiny.tokens import encode
from mixtral_jax.language_model import LanguageModel

EDGES = (0, 128, 256, 512, 1024, 2048)
CONVERSATIONS = 24
SEED = 12345  # no text was trained on that came from it


def long_conversations(count: int) -> list[Conversation]:
    """Conversations of more than 20 turns; their questions are not held out."""
    drawn = (x for x in documents(SEED, marathons=1.0) if isinstance(x, Conversation))
    long = (x for x in drawn if len(x.turns) > 20)
    return list(itertools.islice(long, count))


def by_position(lm: LanguageModel, conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
    """Answer tokens that are the likeliest, after what stands before them in the conversation.

    Returns:
        For each stretch of positions ``from`` .. ``to`` (not included) the number of answer tokens
        and the share that is right; stretches without any are left out.
    """
    assert lm.tokenizer is not None
    right, asked = np.zeros(len(EDGES)), np.zeros(len(EDGES))
    for conversation in conversations:
        encoded = encode(conversation, lm.tokenizer)
        ids, is_answer = (part[: EDGES[-1]] for part in encoded)
        padding = [lm.tokenizer.eos_id] * (EDGES[-1] - len(ids))  # one length, so one program
        best = lm.logits([[*ids, *padding]])[0].argmax(axis=-1)
        places = np.flatnonzero(is_answer)
        stretch = np.searchsorted(EDGES, places, side="right") - 1
        np.add.at(asked, stretch, 1)
        np.add.at(right, stretch, best[places - 1] == np.asarray(ids)[places])
    return [
        {"from": low, "to": high, "tokens": int(n), "right": round(float(k / n), 4)}
        for low, high, n, k in zip(EDGES, EDGES[1:], asked, right, strict=False)
        if n
    ]
