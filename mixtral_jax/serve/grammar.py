"""Grammars: which tokens may come next, by llguidance. Needs the ``serve`` extra.

The vocabulary is given to llguidance as the bytes of each piece, so that a grammar is about the
bytes of the text, however tokens divide it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from mixtral_jax.decode.controls import num_words
from mixtral_jax.serve.request import Grammar, Refused
from mixtral_jax.tokenizer import SPACE, Tokenizer

# What a stranger may send: beyond these, compiling could take longer than a second.
MOST_SCHEMA_BYTES = 1 << 16
MOST_REGEX_BYTES = 1 << 12
MOST_DEPTH = 64
_MOST_KEPT = 32  # compiled grammars
_LIMITS = {
    "initial_lexer_fuel": 400_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
_OBJECT = '{"type": "object"}'
# Or a model that likes white space could write nothing else.
_JSON_OPTIONS: Any = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{0,16}"}


class Vocabulary:
    """What llguidance asks of a tokenizer (its attributes are llguidance's names)."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]):
        self.eos_token_id = min(eos_ids)
        self.bos_token_id = tokenizer.bos_id
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for token_id in range(vocab_size):
            text = _bytes_of(tokenizer, token_id)
            if text is None:
                self.special_token_ids.append(token_id)
                text = f"<|{token_id}|>".encode()
            self.tokens.append(text)
        special = set(self.special_token_ids)
        self._ids = {self.tokens[i]: i for i in range(vocab_size) if i not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes) -> list[int]:
        """Some tokens of a text: the longest first."""
        ids, start = [], 0
        while start < len(text):
            for size in range(min(self._longest, len(text) - start), 0, -1):
                token_id = self._ids.get(text[start : start + size])
                if token_id is not None:
                    ids.append(token_id)
                    start += size
                    break
            else:
                start += 1  # no piece and no byte: cannot be written
        return ids


def _bytes_of(tokenizer: Tokenizer, token_id: int) -> bytes | None:
    """The bytes that a token adds to a text; None where it is no text."""
    if token_id >= tokenizer.vocab_size or tokenizer.is_control(token_id):
        return None
    byte = tokenizer.byte_of(token_id)
    if byte is not None:
        return bytes([byte])
    piece = tokenizer.pieces[token_id]
    # The unknown piece shows as a text of its own, which is not its name.
    if tokenizer.text_of(token_id) != piece.replace(SPACE, " "):
        return None
    return piece.replace(SPACE, " ").encode() or None


class Matcher:
    """How far an answer has come in its grammar. Not thread-safe."""

    def __init__(self, matcher: Any, num_bits: int):
        self._matcher, self._num_words = matcher, num_words(num_bits)

    def mask(self) -> np.ndarray:
        """The tokens allowed next, packed: uint32 ``[words]``.

        Raises:
            ValueError: if the grammar has become too complex, or has no way on.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        packed = np.zeros((self._num_words * 4,), np.uint8)
        packed[: len(bits)] = bits[: len(packed)]
        if self._matcher.is_error() or not packed.any():
            raise ValueError(self._matcher.get_error() or "no token can follow")
        return packed.view(np.uint32)

    def take(self, token_id: int) -> None:
        """The token that was written.

        Raises:
            ValueError: if the grammar does not allow it.
        """
        if not self._matcher.consume_token(token_id):
            raise ValueError(self._matcher.get_error() or f"token {token_id} is not allowed")


class GrammarCompiler:
    """Makes matchers; thread-safe. Keeps the grammars that were last used.

    Args:
        tokenizer: of the model.
        vocab_size: of the model.
        eos_ids: ids that end an answer.

    Raises:
        ImportError: without llguidance.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Collection[int]):
        import llguidance

        vocabulary: Any = Vocabulary(tokenizer, vocab_size, eos_ids)
        self._lib, self._vocab_size = llguidance, vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(vocabulary), n_vocab=vocab_size, eos_token=sorted(eos_ids)
        )
        self._start = functools.lru_cache(_MOST_KEPT)(self._compile)

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher of its own at the start of a grammar.

        Raises:
            Refused: ``invalid`` for a grammar that is none, or larger than the limits.
        """
        return Matcher(self._start(grammar).deep_copy(), self._vocab_size)

    def _compile(self, grammar: Grammar) -> Any:
        library = self._lib
        matcher = library.LLMatcher(
            self._tokenizer,
            self._source(grammar),
            log_level=0,
            limits=library.LLParserLimits(**_LIMITS),
        )
        fault = matcher.get_error() if matcher.is_error() else ""
        if not fault:
            try:
                Matcher(matcher, self._vocab_size).mask()
            except ValueError as error:
                fault = str(error)
        if fault:
            raise _refusal(grammar, fault)
        return matcher

    def _source(self, grammar: Grammar) -> str:
        make = self._lib.LLMatcher
        is_json = grammar.kind in ("json", "json_schema")
        most = MOST_SCHEMA_BYTES if is_json or grammar.kind == "lark" else MOST_REGEX_BYTES
        size = len(grammar.text.encode("utf-8", "surrogatepass"))
        if size > most:
            raise _refusal(grammar, f"expected at most {most} bytes, got {size}")
        if grammar.kind == "json":
            return make.grammar_from_json_schema(_OBJECT, overrides=_JSON_OPTIONS)
        try:
            if grammar.kind == "json_schema":
                schema = _checked_schema(grammar)
                return make.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
            if grammar.kind == "regex":
                return make.grammar_from_regex(grammar.text)
            return make.grammar_from_lark(grammar.text)
        except (ValueError, UnicodeError) as error:
            raise _refusal(grammar, str(error)) from None


def _checked_schema(grammar: Grammar) -> str:
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError):
        raise _refusal(grammar, "this is no JSON") from None
    if not isinstance(schema, dict):
        raise _refusal(grammar, f"expected a JSON object, got {type(schema).__name__}")
    if _depth(schema) > MOST_DEPTH:
        raise _refusal(grammar, f"expected at most {MOST_DEPTH} levels")
    return json.dumps(schema)


def _depth(value: Any) -> int:
    """Levels of nesting, without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner: list[Any] = []
        for item in level:
            children: Sequence[Any] = ()
            if isinstance(item, dict):
                children = list(item.values())
            elif isinstance(item, list):
                children = item
            inner += [child for child in children if isinstance(child, dict | list)]
        level = inner
    return depth


def _refusal(grammar: Grammar, why: str) -> Refused:
    line = " ".join(why.split())[:300]
    return Refused("invalid", f"grammar ({grammar.kind}): {line}; fix: simplify or correct it")
