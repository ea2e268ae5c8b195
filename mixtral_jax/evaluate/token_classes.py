"""Kinds of tokens, by what they spell: what an expert may be found to be for."""

from __future__ import annotations

import unicodedata

import numpy as np
from jaxtyping import Int

from mixtral_jax.tokenizer import SPACE, Tokenizer

CLASSES = ("digits", "letters", "operators", "punctuation", "whitespace", "bytes", "control")
_OPERATORS = frozenset("+-*/=<>%^")


def class_of(piece: str) -> str:
    """The class of a piece that spells text; the space before a word does not count.

    A letter anywhere makes ``letters``; signs are ``operators`` if all of them can be, a hyphen
    too.
    """
    text = piece.replace(SPACE, " ").strip()
    if not text:
        return "whitespace"
    if any(unicodedata.category(c)[0] in "LM" for c in text):
        return "letters"
    if any(unicodedata.category(c)[0] == "N" for c in text):
        return "digits"
    if all(c in _OPERATORS or unicodedata.category(c) == "Sm" for c in text):
        return "operators"
    return "punctuation"


def token_classes(tokenizer: Tokenizer) -> Int[np.ndarray, " V"]:
    """Of each token id of a tokenizer, its place in ``CLASSES``.

    Byte pieces below 128 are what their character is, the others ``bytes`` (part of a character
    without a piece of its own); <unk>, <s>, [INST] and their like are ``control``.
    """
    found = np.zeros(tokenizer.vocab_size, np.int64)
    for token_id, piece in enumerate(tokenizer.pieces):
        byte = tokenizer.byte_of(token_id)
        if tokenizer.is_control(token_id) or piece == "<unk>":
            name = "control"
        elif byte is None:
            name = class_of(piece)
        else:
            name = class_of(chr(byte)) if byte < 128 else "bytes"  # ASCII
        found[token_id] = CLASSES.index(name)
    return found
