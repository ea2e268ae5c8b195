"""Text to token ids and back: SentencePiece models of Mixtral (v1: 32000 ids, v3: 32768 ids).

A v3 model has control pieces for the chat format ([INST] is id 3); a v1 model spells them as text.
Nothing here needs jax.
"""

from __future__ import annotations

import codecs
import functools
import operator
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, SupportsIndex

import sentencepiece

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError

SPACE = "▁"  # how SentencePiece writes a space inside a piece
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
FILE_NAME = "tokenizer.model"

# A character has at most four bytes, so what came earlier cannot reach into a continuation.
_LONGEST_CHARACTER = 4


def find_tokenizer(folder: str | Path) -> Path | None:
    """The SentencePiece model of a checkpoint folder, or None.

    ``tokenizer.model`` is preferred, then names as published with a version: ``*.model.v3``,
    ``*.model.v1``.
    """
    folder = Path(folder)
    patterns = (FILE_NAME, f"{FILE_NAME}.v3", f"{FILE_NAME}.v1", "*.model.v3", "*.model.v1")
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                return path
    return None


class Tokenizer:
    """A SentencePiece model and what Mixtral's formats need to know of it. Immutable.

    Args:
        model: the bytes of a SentencePiece model file.
        source: the file's name, for error lines.

    Raises:
        MixtralError: exit code 65 if the bytes are no SentencePiece model with <s> and </s>.
    """

    def __init__(self, model: bytes, *, source: str = FILE_NAME):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            if not model:
                raise RuntimeError("empty file")
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError:
            raise MixtralError(
                source,
                expected="a SentencePiece model",
                got=f"{len(model)} bytes that are none",
                fix="copy tokenizer.model from the published checkpoint again",
                code=BAD_DATA,
            ) from None
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise MixtralError(
                source,
                expected="a SentencePiece model with pieces <s> and </s>",
                got=f"ids {self.bos_id} and {self.eos_id}",
                fix="use the tokenizer.model that was published with the weights",
                code=BAD_DATA,
            )
        self.control_ids: dict[str, int] = {
            self._processor.id_to_piece(token_id): token_id
            for token_id in range(self.vocab_size)
            if self._processor.is_control(token_id)
        }
        self.version: Literal["v1", "v3"] = "v3" if self.control_ids.get("[INST]") == 3 else "v1"

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Reads a SentencePiece model file.

        Raises:
            MixtralError: exit code 66 without the file, 65 if it is no SentencePiece model.
        """
        path = Path(path)
        try:
            model = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise _missing(path, path.parent) from None
        if path.suffix == ".json":
            raise _missing(path, path.parent)
        return cls(model, source=str(path))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads the tokenizer of a checkpoint folder (``find_tokenizer``).

        Raises:
            MixtralError: exit code 66 without one, 65 if it is no SentencePiece model.
        """
        path = find_tokenizer(folder)
        if path is None:
            raise _missing(Path(folder) / FILE_NAME, Path(folder))
        return cls.from_file(path)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a text, with one <s> first unless ``bos`` is false.

        SentencePiece puts a space before the text. Control pieces spelled in the text stay text.

        Raises:
            MixtralError: exit code 65 if this is no text that UTF-8 can hold.
        """
        try:
            token_ids = self._processor.encode(text.encode("utf-8"), out_type=int)
        except UnicodeEncodeError as error:
            raise MixtralError(
                f"text at character {error.start}",
                expected="Unicode characters",
                got="half of a surrogate pair",
                fix="decode the input as UTF-8 first",
                code=BAD_DATA,
            ) from None
        return [self.bos_id, *token_ids] if bos else token_ids

    def decode(self, token_ids: Iterable[SupportsIndex]) -> str:
        """The text of token ids: control pieces are left out, invalid UTF-8 becomes U+FFFD.

        Raises:
            MixtralError: exit code 65 for an id outside the vocabulary.
        """
        return self._processor.decode([self._checked(token_id) for token_id in token_ids])

    def control_id(self, name: str) -> int:
        """The id of a control piece such as ``"[INST]"``.

        Raises:
            MixtralError: exit code 65 if this tokenizer has no control piece of that name.
        """
        if name not in self.control_ids:
            raise MixtralError(
                f"control piece {name}",
                expected=f"one of the {len(self.control_ids)} of this {self.version} tokenizer",
                got="none of that name",
                fix="use the tokenizer that was published with the weights",
                code=BAD_DATA,
            )
        return self.control_ids[name]

    @functools.cached_property
    def pieces(self) -> tuple[str, ...]:
        """The vocabulary by id, as SentencePiece writes it (a space as ▁)."""
        return tuple(self._processor.id_to_piece(token_id) for token_id in range(self.vocab_size))

    @functools.cached_property
    def control_pattern(self) -> re.Pattern[str]:
        """Finds control pieces spelled in a text: as one group, the longest that fits."""
        return re.compile(f"({_any_of(self.control_ids)})")

    @functools.cached_property
    def longest_piece(self) -> int:
        """Bytes of text that a token stands for at most."""
        return max(len(piece.replace(SPACE, " ").encode()) for piece in self.pieces)

    def is_control(self, token_id: SupportsIndex) -> bool:
        """Whether an id stands for a control piece (never shown as text)."""
        return self._processor.is_control(self._checked(token_id))

    def byte_of(self, token_id: SupportsIndex) -> int | None:
        """The byte 0..255 that a byte-fallback piece stands for, None for every other piece."""
        token_id = self._checked(token_id)
        if not self._processor.is_byte(token_id):
            return None
        return int(self._processor.id_to_piece(token_id)[1:-1], base=16)

    def text_of(self, token_id: SupportsIndex) -> str:
        """The text of one piece inside a sentence: its leading space is kept."""
        token_id = self._checked(token_id)
        if self._processor.is_control(token_id) or self._processor.is_unknown(token_id):
            return self._processor.decode([token_id])
        return self._processor.id_to_piece(token_id).replace(SPACE, " ")

    def _checked(self, token_id: SupportsIndex) -> int:
        token_id = operator.index(token_id)
        if not 0 <= token_id < self.vocab_size:
            raise MixtralError(
                "token id",
                expected=f"0 to {self.vocab_size - 1}",
                got=token_id,
                fix="use the tokenizer that was published with the weights",
                code=BAD_DATA,
            )
        return token_id


def _any_of(names: Collection[str]) -> str:
    """A pattern for any of the names, as a tree: hundreds of them cost a text no more than one."""
    rests: dict[str, list[str]] = {}
    for name in filter(None, names):
        rests.setdefault(name[0], []).append(name[1:])
    branches = "|".join(re.escape(first) + _any_of(rest) for first, rest in rests.items())
    return f"(?:{branches})" + ("?" if "" in names else "") if branches else ""


def _missing(path: Path, folder: Path) -> MixtralError:
    if (folder / "tokenizer.json").is_file():
        return MixtralError(
            f"{folder} has a tokenizer.json, but only SentencePiece (tokenizer.model) is read",
            fix="copy tokenizer.model from the published checkpoint into that folder",
            code=INPUT_NOT_FOUND,
        )
    return MixtralError(
        f"no tokenizer at {path}",
        fix="copy tokenizer.model from the published checkpoint, or work with token ids",
        code=INPUT_NOT_FOUND,
    )


class IncrementalDetokenizer:
    """The text of a continuation, piece by piece, in constant time per token.

    All pushes and ``flush`` together give ``decode(prompt + continuation)`` less
    ``decode(prompt)``: a continuation of a prompt keeps its first space. A character that the
    prompt began and the continuation completes is given whole. Leave ``prompt_ids`` out for the
    text on its own as ``decode`` gives it, without that space (as people expect of an answer).

    The rules are those of SentencePiece's decoder: a run of byte pieces is read as UTF-8, each byte
    that does not fit becomes U+FFFD, and a control piece ends the run.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[SupportsIndex] = ()):
        self._tokenizer = tokenizer
        self._bytes = bytearray()  # the beginning of a character
        self._prompt_bytes = 0  # how many of them the prompt has shown as U+FFFD
        self._at_start = True  # no text yet: a leading space is not shown
        head, tail = prompt_ids[:-_LONGEST_CHARACTER], prompt_ids[-_LONGEST_CHARACTER:]
        for token_id in head:
            self.push(token_id)
            if not self._at_start:
                break
        for token_id in tail:
            self.push(token_id)
        self._prompt_bytes = len(self._bytes)

    def push(self, token_id: SupportsIndex) -> str:
        """Takes the next token and returns the text that is complete now, possibly none.

        Raises:
            MixtralError: exit code 65 for an id outside the vocabulary.
        """
        byte = self._tokenizer.byte_of(token_id)
        if byte is not None:
            self._bytes.append(byte)
            self._at_start = False
            return self._drain(final=False)
        text = self._drain(final=True)
        if not self._at_start:
            return text + self._tokenizer.text_of(token_id)
        shown = self._tokenizer.decode([token_id])
        self._at_start = not shown and not self._tokenizer.text_of(token_id).startswith(" ")
        return text + shown

    def flush(self) -> str:
        """The rest at the end of the text: bytes of a character that was never completed."""
        return self._drain(final=True)

    def _drain(self, *, final: bool) -> str:
        text = ""
        while self._bytes:
            try:
                complete, used = codecs.utf_8_decode(bytes(self._bytes), "strict", final)
            except UnicodeDecodeError as error:
                complete = self._bytes[: error.start].decode("utf-8")
                complete += "" if error.start < self._prompt_bytes else REPLACEMENT
                used = error.start + 1
            if not used:
                break
            text += complete
            del self._bytes[:used]
            self._prompt_bytes = max(0, self._prompt_bytes - used)
        return text
