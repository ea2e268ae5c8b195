"""Reads one safetensors file defensively, with positioned reads only.

Never mapped: a mapped file that is truncated meanwhile kills the process. Every offset is proved
to lie inside the file before a byte of data is read. Format:
https://huggingface.co/docs/safetensors (an 8-byte length, a JSON header, the data).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.json_file import AGAIN, parse_json

# The format allows 100 MB; the largest Mixtral header is 0.2 MB, and parsing must stay under 2 s.
MAX_HEADER_BYTES = 32_000_000
_LARGE_READ = 1 << 20
# What stands for a file's content in a fingerprint: blocks, evenly spaced, and bytes of each.
SAMPLE_BLOCKS, SAMPLE_BYTES = 16, 64 << 10

# safetensors dtype -> bytes per element. What Mixtral weights may be is in FLOATS.
_WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
FLOATS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


# What arrays of ours may be: weights, and the parts of quantized ones.
STORED: dict[str, np.dtype] = {
    dtype.name: dtype
    for dtype in (
        *FLOATS.values(),
        np.dtype(ml_dtypes.float8_e4m3fn),
        *map(np.dtype, (np.int8, np.uint8, np.uint16, np.int32)),
    )
}


def np_dtype(name: str) -> np.dtype:
    """The numpy dtype of a name in ``STORED``."""
    return STORED[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
    """Where one tensor lies. ``start`` and ``stop`` are bytes from the beginning of the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: the last dim of a matrix, one element of a vector."""
        rows = math.prod(self.shape[:-1] or self.shape)
        return (self.stop - self.start) // rows if rows else 0


class SafetensorsFile:
    """One open file with a proved header.

    Args:
        path: a regular file (or a link to one).

    Raises:
        MixtralError: exit code 66 if it is not there, 65 naming the file if it is not sound.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise MixtralError(
                f"no such file: {path}",
                fix="download the checkpoint again; every shard of its index is needed",
                code=INPUT_NOT_FOUND,
            ) from None
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise bad_file(path, "not a regular file")
            self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
            header = _read_header(self._fd, path, self.size)
            self.header_digest = hashlib.sha256(header).hexdigest()
            entries = parse_json(header, path)
            about = entries.pop("__metadata__", None)
            self.metadata = dict(about) if isinstance(about, dict) else {}
            self.tensors = _parse_entries(entries, 8 + len(header), path, self.size)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def check_unchanged(self) -> None:
        """Refuses a file that was written to, or replaced, since it was opened (exit code 65)."""
        now = os.fstat(self._fd)
        try:
            named = os.stat(self.path)
            same = os.path.samestat(named, now)
        except OSError:  # moved away: what is open is still whole
            same = True
        if not same or (now.st_size, now.st_mtime_ns) != (self.size, self.mtime_ns):
            raise MixtralError(
                f"{self.path} was changed while it was read",
                fix="let nothing write to it, and start again",
                code=BAD_DATA,
            )

    def read_into(self, out: memoryview, offset: int) -> None:
        """Fills ``out`` (writable bytes) from ``offset`` of the file.

        Raises:
            MixtralError: exit code 65 if the file has become shorter than its header says.
        """
        if len(out) < _LARGE_READ:
            read_exactly(self._fd, out, offset, self.path)
            return
        # An open file of its own: the system reads ahead of one sequence per open file, and
        # threads that share one break each other's.
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # moved away meanwhile: the one that was proved is still open
            read_exactly(self._fd, out, offset, self.path)
            return
        try:
            same = os.path.sameopenfile(fd, self._fd)
            read_exactly(fd if same else self._fd, out, offset, self.path)
        finally:
            os.close(fd)

    def prefetch(self, start: int, stop: int) -> None:
        """Asks the system to read bytes ahead into its own cache."""
        prefetch(self._fd, start, stop)

    def sample_digest(self) -> str:
        """The sha256 of a sample of the file; of all of it, up to 1 MiB."""
        sample = hashlib.sha256()
        for i in range(SAMPLE_BLOCKS):
            start = max(0, self.size - SAMPLE_BYTES) * i // (SAMPLE_BLOCKS - 1)
            block = bytearray(min(SAMPLE_BYTES, self.size))
            self.read_into(memoryview(block), start)
            sample.update(block)
        return sample.hexdigest()


def prefetch(fd: int, start: int, stop: int) -> None:
    """Asks the system to read bytes of an open file ahead, where it can be asked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, start, stop - start, os.POSIX_FADV_WILLNEED)


def bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, shared with it."""
    return memoryview(cast(Any, array.view(np.uint8).reshape(-1)))


def read_exactly(fd: int, out: memoryview, offset: int, path: Path) -> None:
    """Fills ``out`` (writable bytes) from ``offset`` of an open file, or raises exit code 65."""
    done = 0
    while done < len(out):
        got = os.preadv(fd, [out[done:]], offset + done)
        if got == 0:
            raise bad_file(path, f"truncated: it ends at byte {offset + done}")
        done += got


def encode_header(entries: Mapping[str, Any]) -> bytes:
    """What precedes the data of a file: the length, and the JSON filled up to whole 8 bytes."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bad_file(path: Path | str, why: str) -> MixtralError:
    """The error of a file that is not sound."""
    return MixtralError(f"{path}: {why}", fix=AGAIN, code=BAD_DATA)


def _read_header(fd: int, path: Path, size: int) -> bytes:
    if size < 8:
        raise bad_file(path, f"not a safetensors file: {size} bytes")
    (length,) = struct.unpack("<Q", os.pread(fd, 8, 0))
    if length > MAX_HEADER_BYTES:
        raise bad_file(path, f"header length {length}, at most {MAX_HEADER_BYTES} are accepted")
    if length + 8 > size:
        raise bad_file(path, f"truncated: header of {length} bytes in a file of {size}")
    header = bytearray(length)
    read_exactly(fd, memoryview(header), 8, path)
    return bytes(header)


def _parse_entries(
    entries: Mapping[str, Any], base: int, path: Path, size: int
) -> dict[str, Tensor]:
    tensors = {name: _parse_entry(name, entry, path, base, size) for name, entry in entries.items()}
    end = base
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if tensor.start != end:
            kind = "overlaps its neighbour" if tensor.start < end else "leaves a hole before it"
            raise bad_file(path, f"tensor {tensor.name!r} {kind}")
        end = tensor.stop
    if end != size:
        raise bad_file(path, f"header accounts for {end} bytes, the file has {size}")
    return tensors


def _parse_entry(name: str, entry: Any, path: Path, base: int, size: int) -> Tensor:
    where = f"tensor {name[:200]!r}"
    if "\0" in name or not isinstance(entry, dict):
        raise bad_file(path, f"{where} is not described by an object")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _WIDTHS or len(entry) != 3:
        raise bad_file(path, f"{where}: unknown dtype or fields")
    shape, offsets = _sizes(entry.get("shape")), _sizes(entry.get("data_offsets"))
    if shape is None or len(shape) > 8 or offsets is None or len(offsets) != 2:
        raise bad_file(path, f"{where}: shape and data_offsets must be lists of sizes")
    start, stop = offsets
    if not start <= stop <= size - base:
        raise bad_file(path, f"{where}: bytes {start}..{stop} of {size - base}")
    if math.prod(shape) * _WIDTHS[dtype] != stop - start:
        raise bad_file(path, f"{where}: {dtype}{shape} does not take {stop - start} bytes")
    return Tensor(
        name=name,
        file=path.name,
        dtype=dtype,
        shape=tuple(shape),
        start=base + start,
        stop=base + stop,
    )


def _sizes(value: Any) -> list[int] | None:
    sound = isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**63 for n in value
    )
    return value if sound else None
