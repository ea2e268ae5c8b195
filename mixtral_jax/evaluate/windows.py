"""Windows over a stream of tokens: which token is scored where, and behind how many others.

The convention is that of the sliding-window example in transformers' documentation ("Perplexity of
fixed-length models"). With context C and stride S, window k holds the tokens [k S, k S + C) of the
text, and in it those are scored that no window before it scored:

- token 0 (the <s> of a text) is read and never scored: nothing stands before it;
- the first window scores tokens 1 to C - 1, behind 1 to C - 1 tokens (all there are);
- every later window scores S tokens, behind C - S to C - 1 tokens; the last one may score fewer.

Two things are made exact here that the example leaves loose. Where S = C the windows do not
overlap, and the example never scores the first token of a window: here a window then reads the one
token before it too, so that every token but token 0 is scored exactly once. And the mean is over
the tokens that were scored (the example weights each later window by one token too few).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import USAGE, MixtralError

DEFAULT_CONTEXT = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windowing:
    """Sizes of windows, in tokens.

    Attributes:
        context: tokens of a window; the model's ``max_position_embeddings``, but at most 2048, if
            None.
        stride: tokens from a window's beginning to the next one's; half the context, if None.
    """

    context: int | None = None
    stride: int | None = None

    def __post_init__(self):
        for name, least in (("context", 2), ("stride", 1)):
            given = getattr(self, name)
            if given is not None and given < least:
                expected, fix = f"at least {least}", f"--{name} {least}"
                raise MixtralError(f"--{name}", expected=expected, got=given, fix=fix, code=USAGE)

    def fit(self, configs: Sequence[ModelConfig]) -> tuple[int, int]:
        """(context, stride) for these models.

        Raises:
            MixtralError: exit code 64 if a model cannot hold the context, or the stride is longer.
        """
        longest = min(config.max_position_embeddings for config in configs)
        context = self.context or min(DEFAULT_CONTEXT, longest)
        if context > longest:
            expected, fix = f"at most {longest} (max_position_embeddings)", f"--context {longest}"
            raise MixtralError("--context", expected=expected, got=context, fix=fix, code=USAGE)
        stride = self.stride or max(context // 2, 1)
        if stride > context:
            expected, fix = f"at most the context ({context})", f"--stride {context}"
            raise MixtralError("--stride", expected=expected, got=stride, fix=fix, code=USAGE)
        return context, stride


class Window(NamedTuple):
    """Part of a text: its token ids, the first of which is token ``begin`` of the text.

    Tokens ``first`` of the text to the window's end are scored in it.
    """

    begin: int
    first: int
    token_ids: list[int]


def windows(token_ids: Iterable[int], context: int, stride: int) -> Iterator[Window]:
    """Cuts a stream of tokens, holding no more than a window and a token of it at a time."""
    source, held = iter(token_ids), []
    begin, nominal, first = 0, 0, 1
    while True:
        wanted = nominal + context - begin
        held.extend(islice(source, wanted - len(held)))
        if begin + len(held) <= first:
            return
        yield Window(begin, first, held[:])
        if len(held) < wanted:
            return
        first = begin + len(held)
        nominal += stride
        following = min(nominal, first - 1)
        del held[: following - begin]
        begin = following


class Rows(NamedTuple):
    """Windows as arrays ``[B, T]``; a window's last token is a target only and is not read.

    ``targets[b, t]`` is the token behind ``tokens[b, t]``; ``is_scored`` marks the places whose
    target is scored in this window, ``begin`` is where it begins in the text.
    """

    tokens: np.ndarray  # int32
    valid: np.ndarray  # bool
    targets: np.ndarray  # int32
    is_scored: np.ndarray  # bool
    begin: np.ndarray  # int64 [B]


def stack(batch: Sequence[Window], num_rows: int, length: int) -> Rows:
    """Puts windows into rows; the rest is padding that repeats a row's own last token."""
    shape = (num_rows, length)
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    valid, is_scored = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
    begin = np.zeros((num_rows,), np.int64)
    for row, window in enumerate(batch):
        # Nothing stands before its first token: a slice from -1 would score none of it.
        assert window.begin < window.first, window
        count = len(window.token_ids) - 1
        tokens[row, :count] = window.token_ids[:-1]
        # A masked NaN is NaN still, so no row may meet another's tokens.
        tokens[row, count:] = window.token_ids[-2]
        targets[row, :count] = window.token_ids[1:]
        valid[row, :count] = True
        is_scored[row, window.first - window.begin - 1 : count] = True
        begin[row] = window.begin
    tokens[len(batch) :] = tokens[len(batch) - 1]
    return Rows(tokens, valid, targets, is_scored, begin)
