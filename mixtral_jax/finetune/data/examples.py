"""All examples, encoded and checked once before the first step, in a file instead of in memory."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Int64

from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.finetune.data.columns import COLUMNS
from mixtral_jax.finetune.data.encode import Example, Pair, encode_dpo, encode_sft
from mixtral_jax.finetune.data.files import find_files, read_rows
from mixtral_jax.tokenizer import Tokenizer

MOST_BAD_LINES = 10  # reading ends at the tenth

_TOKEN = np.dtype([("id", "<i4"), ("is_target", "?")])
_Encode: TypeAlias = Callable[[Mapping[str, Any], Tokenizer], Example | Pair]


class Examples:
    """Encoded examples, or pairs of them, by number.

    They lie in a file of the folder for temporary files that has no name, so it goes with the
    process. What is read stays in memory as long as there is room.

    Args:
        encoded: examples only, or pairs only. Each sequence is cut to its first ``max_length``
            tokens; an example of which nothing to score is left is skipped, as is a pair of which
            one answer has nothing left (TRL, too, drops what truncation has left without labels).
        max_length: of a sequence in tokens.
        name: of the data, for the error.

    Attributes:
        is_pairs: whether these are pairs.
        digest: SHA-256 in hex of the token ids and their marks. It changes with the data, the
            tokenizer and ``max_length``, not with names or formats of files.
        num_truncated: examples (or pairs) that were cut and kept.
        num_skipped: examples (or pairs) that were skipped.

    Raises:
        MixtralError: exit code 65 if no example is left.
    """

    def __init__(
        self, encoded: Iterable[Example | Pair], *, max_length: int, name: str = "training data"
    ):
        self.num_truncated = self.num_skipped = 0
        self.is_pairs = False
        lengths, digest = array("q"), hashlib.sha256()
        with tempfile.TemporaryFile(prefix="mixtral-jax-") as file:
            for one in encoded:
                self.is_pairs = isinstance(one, Pair)
                whole = one if isinstance(one, Pair) else (one,)
                cut = [_cut(sequence, max_length) for sequence in whole]
                if not all(sequence.is_target.any() for sequence in cut):
                    self.num_skipped += 1
                    continue
                self.num_truncated += any(len(sequence.ids) > max_length for sequence in whole)
                for sequence in cut:
                    tokens = _tokens(sequence).tobytes()
                    digest.update(tokens)
                    file.write(tokens)
                    lengths.append(len(sequence.ids))
            file.flush()
            if not lengths:
                raise MixtralError(
                    name,
                    expected=f"something to score in the first {max_length} tokens of an example",
                    got=f"nothing in {self.num_skipped} examples",
                    fix="name other data, or a larger --max-length",
                    code=BAD_DATA,
                )
            self._tokens = np.memmap(file, _TOKEN, mode="r")
        self._ends = np.cumsum(np.array(lengths, np.int64))
        digest.update(self._ends.astype("<i8").tobytes())
        digest.update(bytes([self.is_pairs]))
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends) // (2 if self.is_pairs else 1)

    def __getitem__(self, example_id: int) -> Example | Pair:
        if not 0 <= example_id < len(self):
            raise IndexError(f"example {example_id} of {len(self)}")
        if not self.is_pairs:
            return self._sequence(example_id)
        return Pair(self._sequence(2 * example_id), self._sequence(2 * example_id + 1))

    @property
    def lengths(self) -> Int64[np.ndarray, " sequences"]:
        """Tokens of each sequence; of pairs the chosen one's, then the rejected one's."""
        return np.diff(self._ends, prepend=0)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self._ends[-1])

    @property
    def num_targets(self) -> int:
        """Scored tokens of all sequences."""
        return int(np.count_nonzero(self._tokens["is_target"]))

    def notes(self) -> list[str]:
        """What was cut and what was skipped, a line each, for people."""
        total, lines = len(self) + self.num_skipped, []
        if self.num_truncated:
            lines.append(f"{self.num_truncated} of {total} examples were cut to --max-length")
        if self.num_skipped:
            lines.append(f"{self.num_skipped} of {total} examples skipped: nothing left to score")
        return lines

    def _sequence(self, i: int) -> Example:
        begin = self._ends[i - 1] if i else 0
        tokens = np.asarray(self._tokens[begin : self._ends[i]])
        return Example(tokens["id"].astype(np.int32), tokens["is_target"].copy())


def _cut(sequence: Example, max_length: int) -> Example:
    return Example(sequence.ids[:max_length], sequence.is_target[:max_length])


def _tokens(sequence: Example) -> np.ndarray:
    tokens = np.empty(len(sequence.ids), _TOKEN)
    tokens["id"], tokens["is_target"] = sequence
    return tokens


def load_examples(
    names: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    method: Literal["sft", "dpo"] = "sft",
) -> Examples:
    """Reads, checks and encodes all training data.

    Args:
        names: files, folders and glob patterns (``files.find_files``).
        tokenizer: of the model that learns.
        max_length: longer sequences are cut to it.
        method: chooses which columns count (``columns``).

    Raises:
        MixtralError: exit code 65 naming the first bad lines, or if there is nothing to learn;
            66 for a name that is not there; 64 for a pattern that mixes splits; 78 without pyarrow.
    """
    if max_length < 2:
        fix = "--max-length 2048"
        raise MixtralError(
            "--max-length", expected="at least 2", got=max_length, fix=fix, code=USAGE
        )
    encode = encode_dpo if method == "dpo" else encode_sft
    encoded = _encoded(find_files(names), tokenizer, encode)
    return Examples(encoded, max_length=max_length, name=f"data {', '.join(map(str, names))}")


def _encoded(
    paths: Sequence[Path], tokenizer: Tokenizer, encode: _Encode
) -> Iterator[Example | Pair]:
    problems: list[str] = []
    rows = itertools.chain.from_iterable(read_rows(path, COLUMNS) for path in paths)
    for row in rows:
        try:
            one = encode(row.columns(), tokenizer)
        except MixtralError as error:
            problems.append(f"{row.where}: {error}")
            if len(problems) == MOST_BAD_LINES:
                break
        else:
            yield one
    if problems:
        many = f"{len(problems)} bad lines" if len(problems) > 1 else "a bad line"
        end = " (there may be more)" if len(problems) == MOST_BAD_LINES else ""
        raise MixtralError(f"{many} in the data{end}: {'; '.join(problems)}", code=BAD_DATA)
