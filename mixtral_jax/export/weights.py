"""The weights beside the programs: leaves by their paths, in safetensors files.

Leaves keep the published layout, so that the programs of every platform read the same files; in
what form a platform takes them, export.json tells.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.convert.leaves import Leaves
from mixtral_jax.convert.manifest import LeafRecord, file_sha256
from mixtral_jax.convert.parts import check_codes
from mixtral_jax.convert.reader import SINGLE_NAME
from mixtral_jax.convert.safetensors_file import STORED, bytes_of, encode_header
from mixtral_jax.convert.transfer import fetch_leaf
from mixtral_jax.errors import BAD_DATA, MixtralError

MAX_FILE_BYTES = 5 * 10**9  # of tensors; a larger one has a file of its own
THREADS = min(8, os.cpu_count() or 1)
# The numpy side of safetensors reads no float8: its bytes are stored, and viewed by who loads them.
_CODES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "U8",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "int32": "I32",
}
assert _CODES.keys() == STORED.keys()


class Form(NamedTuple):
    """Shape and dtype of a stored leaf."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class WeightFiles:
    """model.safetensors, or numbered files where the leaves do not fit one.

    Args:
        forms: of the leaves, in the order in which they are read.
        max_file_bytes: of the tensors in one file.

    Attributes:
        forms: those.
        file_of: the file of each leaf.
    """

    def __init__(self, forms: Mapping[str, Form], max_file_bytes: int = MAX_FILE_BYTES):
        groups: list[list[str]] = [[]]
        for leaf, form in forms.items():
            used = sum(forms[other].size for other in groups[-1])
            if groups[-1] and used + form.size > max_file_bytes:
                groups.append([])
            groups[-1].append(leaf)
        several = "model-{:05}-of-{:05}.safetensors"
        names = [several.format(k, len(groups)) for k in range(1, len(groups) + 1)]
        self.forms = forms
        self.groups = dict(zip(names if len(groups) > 1 else [SINGLE_NAME], groups, strict=True))
        self.file_of = {leaf: name for name, group in self.groups.items() for leaf in group}

    @property
    def num_bytes(self) -> int:
        """Of all leaves."""
        return sum(form.size for form in self.forms.values())

    def write(self, folder: Path, values: Iterator[tuple[str, np.ndarray]]) -> dict[str, str]:
        """Writes leaves that come in the order of ``forms``, durably; gives each file's sha256."""
        digests = {}
        for name, group in self.groups.items():
            header, starts = self._header(group)
            with open(folder / name, "wb") as file:
                file.write(header)
                for leaf in group:
                    given, value = next(values)
                    assert (given, value.shape, value.dtype) == (leaf, *self.forms[leaf])
                    file.seek(starts[leaf])
                    file.write(bytes_of(value))
                file.flush()
                os.fsync(file.fileno())
            digests[name] = file_sha256(folder / name)
        return digests

    def _header(self, group: list[str]) -> tuple[bytes, dict[str, int]]:
        """The header of a file, and where its leaves begin."""
        # Widest elements first, so that every tensor is aligned to its own.
        ordered = sorted(group, key=lambda leaf: -self.forms[leaf].dtype.itemsize)
        entries: dict[str, Any] = {}
        end = 0
        for leaf in ordered:
            form = self.forms[leaf]
            entries[leaf] = {
                "dtype": _CODES[form.dtype.name],
                "shape": list(form.shape),
                "data_offsets": [end, end + form.size],
            }
            end += form.size
        header = encode_header(entries)
        return header, {leaf: len(header) + e["data_offsets"][0] for leaf, e in entries.items()}


class Reading:
    """Reads every leaf once, proved, cast and digested; one is in memory at a time.

    Attributes:
        records: of the leaves read so far.
    """

    def __init__(self, leaves: Leaves, forms: Mapping[str, Form]):
        self._leaves, self._forms = leaves, forms
        self.records: dict[str, LeafRecord] = {}

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        with ThreadPoolExecutor(THREADS) as pool:
            for leaf, (shape, dtype) in self._forms.items():
                value = np.empty(shape, dtype)
                record = fetch_leaf(self._leaves, leaf, value, allow_nonfinite=True, pool=pool)
                if record.nonfinite:
                    raise MixtralError(
                        f"{leaf} has NaN or infinite values, or some too large for {dtype.name}",
                        fix="choose --dtype bfloat16 or float32, or download the checkpoint again",
                        code=BAD_DATA,
                    )
                check_codes(leaf, leaf, value.reshape(-1, shape[-1]))
                self.records[leaf] = record
                yield leaf, value
        self._leaves.check_unchanged()
