"""Calibration text as windows of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mixtral_jax.chat import encode_chat
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".txt")
# A line longer than this is no text of people; it is refused before it fills the memory.
MAX_LINE_BYTES = 64 << 20
BLOCK_CHARACTERS = 1 << 16


def read_windows(
    path: str | Path | None, tokenizer: Tokenizer, *, samples: int, length: int
) -> list[np.ndarray]:
    """The first windows of a text, each of at most ``length`` token ids with <s> first.

    Text (.txt) is one document; a .jsonl file has one in each line, ``{"text": ...}`` or
    ``{"messages": [...]}`` (a conversation, put into the model's chat format).
    A window holds tokens of one document only, so that what it attends to belongs together.

    Args:
        path: the file; only as much of it is read as is needed.
        tokenizer: of the checkpoint.
        samples: so many windows at most.
        length: tokens of a window at most.

    Returns:
        Windows of int32, at least one.

    Raises:
        MixtralError: exit code 64 without a path or of another kind of file, 66 without the file,
            65 naming the line that holds no text or if there is none at all.
    """
    if path is None:
        raise MixtralError(
            "gptq needs calibration text",
            fix="--calibration FILE.txt, or FILE.jsonl with {'text': ...} or {'messages': [...]} "
            "in each line: text like that which the model will read",
            code=USAGE,
        )
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        expected = " or ".join(SUFFIXES)
        raise MixtralError("--calibration", expected=expected, got=repr(path.name), code=USAGE)
    read = jsonl_documents if path.suffix.lower() == ".jsonl" else _text
    documents = read(path, tokenizer)
    found: list[np.ndarray] = []
    for window in _cut(documents, tokenizer.bos_id, length):
        found.append(np.asarray(window, np.int32))
        if len(found) == samples:
            break
    if not found:
        raise MixtralError(f"{path}", expected="some text", got="none", code=BAD_DATA)
    return found


def digest(windows: list[np.ndarray]) -> str:
    """The sha256 of windows, so that a run is resumed with the same ones only."""
    found = hashlib.sha256()
    for window in windows:
        found.update(f"{len(window)}:".encode() + window.astype("<i4").tobytes())
    return found.hexdigest()


def _cut(documents: Iterator[Iterator[int]], bos: int, length: int) -> Iterator[list[int]]:
    """Windows of documents, whose token ids come without <s>."""
    for document in documents:
        window = [bos]
        for token_id in document:
            window.append(token_id)
            if len(window) == length:
                yield window
                window = [bos]
        if len(window) > 1:
            yield window


def _lines(
    path: Path, watch: Callable[[bytes], Any] = lambda line: None
) -> Iterator[tuple[int, str]]:
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                watch(line)
                if len(line) > MAX_LINE_BYTES:
                    raise _bad(path, number, f"at most {MAX_LINE_BYTES} bytes", "more")
                try:
                    yield number, line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise _bad(path, number, "UTF-8", f"a wrong byte at {error.start}") from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        fix = "give a file of text"
        raise MixtralError(f"no file {path}", fix=fix, code=INPUT_NOT_FOUND) from None


def _text(path: Path, tokenizer: Tokenizer) -> Iterator[Iterator[int]]:
    def tokens() -> Iterator[int]:
        block = ""  # of many lines: SentencePiece puts a space before whatever it is given
        for _, line in _lines(path):
            block += line
            if len(block) >= BLOCK_CHARACTERS:
                yield from tokenizer.encode(block, bos=False)
                block = ""
        if block.strip():
            yield from tokenizer.encode(block, bos=False)

    yield tokens()


def jsonl_documents(
    path: Path, tokenizer: Tokenizer, watch: Callable[[bytes], Any] = lambda line: None
) -> Iterator[Iterator[int]]:
    """Token ids without <s> of each line of a .jsonl file, read as by ``read_windows``.

    ``watch`` is given every line as it is read.
    """
    for number, line in _lines(path, watch):
        if line.strip():
            yield iter(_document(path, number, line, tokenizer))


def _document(path: Path, number: int, line: str, tokenizer: Tokenizer) -> list[int]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise _bad(path, number, "JSON", "none") from None
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return tokenizer.encode(entry["text"], bos=False)
    if isinstance(entry, dict) and isinstance(entry.get("messages"), list):
        try:
            return _conversation(entry["messages"], tokenizer)
        except MixtralError as error:
            raise MixtralError(f"{path} line {number}: {error}", code=error.code) from None
    raise _bad(path, number, "an object with 'text' or 'messages'", "something else")


def _conversation(messages: list[Any], tokenizer: Tokenizer) -> list[int]:
    last = messages[-1] if messages else None
    if not (isinstance(last, dict) and last.get("role") == "assistant"):
        return encode_chat(tokenizer, messages)[1:]
    answered = encode_chat(tokenizer, messages, continue_final_message=True)
    return [*answered[1:], tokenizer.eos_id]


def _bad(path: Path, number: int, expected: str, got: str) -> MixtralError:
    return MixtralError(f"{path} line {number}", expected=expected, got=got, code=BAD_DATA)
