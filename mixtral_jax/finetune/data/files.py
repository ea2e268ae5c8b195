"""Data files by name, folder or pattern, and their rows one at a time, each with its place."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError, listing
from mixtral_jax.finetune.output_folder import MARK

SUFFIXES = (".jsonl", ".parquet")  # a folder is searched for these
_MAGIC = b"PAR1"  # a Parquet file begins and ends with it
_ROWS_AT_A_TIME = 256  # of a Parquet file, held as Python objects

# A split in a file's name: of the Hub's train_sft-00000-of-00003-4d1b.parquet, of valid.jsonl.
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


class Row(NamedTuple):
    """A row as it was read: the JSON text of a line, or the columns of a Parquet row.

    ``where`` names the file and the line (of JSONL) or row (of Parquet), both counted from 1.
    """

    where: str
    content: bytes | dict[str, Any]

    def columns(self) -> dict[str, Any]:
        """The values by column.

        Raises:
            MixtralError: exit code 65 if the line is no JSON object.
        """
        if isinstance(self.content, dict):
            return self.content
        try:
            text = self.content.rstrip(b"\r\n").decode("utf-8-sig")  # some files begin with a mark
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise _not_an_object(f"{error.msg} (character {error.colno})") from None
        except UnicodeDecodeError as error:
            raise _not_an_object(f"{error.reason} (byte {error.start + 1})") from None
        except (ValueError, RecursionError) as error:
            raise _not_an_object(str(error)) from None
        if not isinstance(found, dict):
            raise _not_an_object(f"a {type(found).__name__}")
        return found


def _not_an_object(got: str) -> MixtralError:
    fix = "write one object per line (jq -c '.[]' turns a JSON list into that)"
    return MixtralError("the line", expected="a JSON object", got=got, fix=fix, code=BAD_DATA)


def find_files(names: Sequence[str | Path]) -> list[Path]:
    """The files of names, folders (searched with all below them) and glob patterns, each once.

    What folders and patterns find in an OUTPUT_DIR of this command is no data.

    The order is that of ``names``, and by path inside a folder or pattern.

    Raises:
        MixtralError: exit code 66 where nothing is found; 64 if a folder or pattern holds several
            splits, of which only one can be meant.
    """
    found: dict[Path, Path] = {}
    for name in names:
        for path in _matches(name):
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _matches(name: str | Path) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        root, found = path, _not_ours(_below(path))
        got = f"a folder with no {' or '.join(SUFFIXES)} file"
    else:
        root, found = Path(), _not_ours(map(Path, glob.glob(str(name), recursive=True)))
        got = "nothing of that name"
    paths = sorted(one for one in found if one.is_file())
    if not paths:
        what, expected = f"dataset {name}", "data files"
        fix = "name a JSONL or Parquet file, a folder of them, or a pattern in quotes"
        raise MixtralError(what, expected=expected, got=got, fix=fix, code=INPUT_NOT_FOUND)
    splits = sorted({split for one in paths if (split := _split(one, root))})
    if len(splits) > 1:
        what, expected = f"dataset {name}", "files of one split"
        fix = "name the files of one, by a pattern in quotes"
        raise MixtralError(what, expected=expected, got=listing(splits), fix=fix, code=USAGE)
    return paths


def _below(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix in SUFFIXES)
    return [path for path in found if not _is_hidden(path.relative_to(folder))]


def _not_ours(paths: Iterable[Path]) -> list[Path]:
    """Without the log of a run whose OUTPUT_DIR lies among the data."""
    return [path for path in paths if not (path.parent / MARK).is_file()]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _split(path: Path, root: Path) -> str | None:
    """The split that a file's name tells, or else the name of its folder below ``root``."""
    if path.is_relative_to(root):
        path = path.relative_to(root)
    found = _SHARD.match(path.name) or _SPLIT.match(path.name)
    found = found or _SPLIT.fullmatch(path.parent.name)
    return found[1].lower() if found else None


def read_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    """The rows of a file in order. Blank lines of JSONL are passed over, and counted as lines.

    Args:
        path: of a JSONL or Parquet file.
        columns: that are wanted; others of a Parquet file are not read where one of these is there.

    Raises:
        MixtralError: exit code 65 if a Parquet file is damaged, 78 if pyarrow is not installed.
    """
    with path.open("rb") as file:
        if path.suffix != ".parquet" and file.read(len(_MAGIC)) != _MAGIC:
            file.seek(0)
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield Row(f"{path} line {number}", line)
            return
    yield from _parquet_rows(path, columns)


def _parquet_rows(path: Path, columns: Collection[str]) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        fix = "pip install 'mixtral-jax[finetune]'"
        raise MixtralError(f"{path}: Parquet files need pyarrow", fix=fix) from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name in columns]
            batches = file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=wanted or None)
            for batch in batches:
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", row)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of what is on it
        expected, got = "a Parquet file", (str(error).splitlines() or [""])[0][:200]
        fix = "download it again (of a Git LFS pointer: git lfs pull)"
        raise MixtralError(
            f"{path} after row {number}", expected=expected, got=got, fix=fix, code=BAD_DATA
        ) from None
