"""A text file as token ids, read in blocks: the ids of the whole text, in bounded memory."""

from __future__ import annotations

import codecs
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.tokenizer import SPACE, Tokenizer

BLOCK = 1 << 16  # bytes read at a time
_ENDS = " \n"  # a text may be cut before one of these


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """Which text was read.

    Attributes:
        file: its name, without the folder.
        bytes: its size.
        sha256: of its bytes, in hex.
    """

    file: str
    bytes: int
    sha256: str


def no_file(path: Path) -> str:
    """What a path is that is no file."""
    if path.is_dir():
        return "a folder"
    is_there = path.exists()
    return "no file that can be read more than once" if is_there else "no such file"


class TextFile:
    """A UTF-8 text on the disk, taken as it is: line ends are not translated.

    Args:
        path: of a file, which is read once for its digest and once for each pass over its tokens.

    Raises:
        MixtralError: exit code 66 without such a file, 65 if it is empty.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            what, fix = f"--text {self.path}: {no_file(self.path)}", "name a UTF-8 text file"
            raise MixtralError(what, fix=fix, code=INPUT_NOT_FOUND)
        digest, size = hashlib.sha256(), 0
        for block in self._blocks():
            digest.update(block)
            size += len(block)
        if not size:
            expected, fix = "some text", "name another file"
            raise MixtralError(
                f"--text {self.path}", expected=expected, got="0 bytes", fix=fix, code=BAD_DATA
            )
        self.dataset = Dataset(file=self.path.name, bytes=size, sha256=digest.hexdigest())

    def token_ids(
        self, tokenizer: Tokenizer, progress: Callable[[int], None] | None = None
    ) -> Iterator[int]:
        """The ids of ``tokenizer.encode(text)``, one <s> first, a block at a time.

        A text is cut only before a space or line end where no piece of the vocabulary holds the
        characters on both sides, so no piece is missed; what has no such place is held until one
        comes. The ids are those of the whole text for tokenizers of every kind of Mixtral.

        Args:
            tokenizer: of the checkpoint.
            progress: called with the bytes read so far.

        Raises:
            MixtralError: exit code 65 if it is not UTF-8, or not the text that it was before.
        """
        yield tokenizer.bos_id
        joined = _joined_to_ends(tokenizer)
        digest, size = hashlib.sha256(), 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        before, held = "", ""
        for block in self._blocks():
            held += self._decoded(decoder, block, size, is_last=False)
            digest.update(block)
            size += len(block)
            cut = _last_cut(held, joined)
            if cut:
                yield from _encode_behind(tokenizer, before, held[:cut])
                before, held = held[cut - 1], held[cut:]
            if progress is not None:
                progress(size)
        held += self._decoded(decoder, b"", size, is_last=True)
        self.check_unchanged(digest.hexdigest())
        yield from _encode_behind(tokenizer, before, held)

    def check_unchanged(self, sha256: str) -> None:
        """Refuses what was read if it is not the text that it was before (exit code 65)."""
        if sha256 != self.dataset.sha256:
            fix = "run again when nobody writes to it"
            raise MixtralError(f"--text {self.path} changed while read", fix=fix, code=BAD_DATA)

    def _blocks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block

    def _decoded(
        self, decoder: codecs.IncrementalDecoder, block: bytes, size: int, *, is_last: bool
    ) -> str:
        try:
            return decoder.decode(block, is_last)
        except UnicodeDecodeError as error:
            # What it holds of a character that the block before began stands before this block.
            at = size - (len(error.object) - len(block)) + error.start
            raise MixtralError(
                f"--text {self.path} at byte {at}",
                expected="UTF-8",
                got=hex(error.object[error.start]),
                fix="convert it, as by iconv -t UTF-8",
                code=BAD_DATA,
            ) from None


def _joined_to_ends(tokenizer: Tokenizer) -> set[tuple[str, str]]:
    """Pairs of a character and a space or line end behind it that stand inside some piece."""
    pairs = {pair for piece in tokenizer.pieces for pair in pairwise(piece.replace(SPACE, " "))}
    return {pair for pair in pairs if pair[1] in _ENDS}


def _last_cut(text: str, joined: set[tuple[str, str]]) -> int:
    """The last place where the text may be cut in two, 0 where there is none."""
    for i in range(len(text) - 1, 0, -1):
        before, after = text[i - 1], text[i]
        is_word = not before.isspace() and before != SPACE
        if after in _ENDS and is_word and (before, after) not in joined:
            return i
    return 0


def _encode_behind(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    """Ids of a text that follows the character ``before``, or begins where there is none.

    The character is encoded along: else SentencePiece would put a space before the text.
    """
    known = tokenizer.encode(before, bos=False) if before else []
    return tokenizer.encode(before + text, bos=False)[len(known) :]
