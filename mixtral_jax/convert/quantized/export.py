"""Writes a checkpoint of ours in GPTQ codes as the published GPTQ layout, for every other tool.

Names are the original ones; quantize_config.json and the quantization_config of config.json say
what AutoGPTQ and transformers need (see docs/formats.md).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.config import CONFIG_NAME, read_config
from mixtral_jax.convert.companions import copy_companions, find_companions
from mixtral_jax.convert.dequantized import read_chunk, read_matrix
from mixtral_jax.convert.leaves import Leaves, common_dtype, open_leaves
from mixtral_jax.convert.manifest import sync_folder, write_durably
from mixtral_jax.convert.names import PUBLISHED, Piece, pieces
from mixtral_jax.convert.orbax import disk_full, is_disk_full
from mixtral_jax.convert.parts import parts_of, quantized_weights
from mixtral_jax.convert.preflight import check_destination, check_disk, refuse_existing
from mixtral_jax.convert.quantized.form import DTYPES, Note
from mixtral_jax.convert.quantized.gptq import WORD_BITS, encode
from mixtral_jax.convert.reader import INDEX_NAME, SINGLE_NAME
from mixtral_jax.convert.safetensors_file import bytes_of
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.model.transformer import LeafSpec, leaf_specs
from mixtral_jax.qtensor import SCHEMES

QUANTIZE_NAME = "quantize_config.json"
_CODES = {dtype: name for name, dtype in DTYPES.items()}


class Made(NamedTuple):
    """How the codes were made, for quantize_config.json; it touches no reader of the files."""

    damp_percent: float = 0.01
    true_sequential: bool = False


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_gptq(
    src: str | Path,
    dst: str | Path,
    *,
    is_v2: bool = False,
    made: Made = Made(),  # noqa: B008 (it is immutable)
    max_shard_bytes: int = 5 * 10**9,
    note: Note = lambda line: None,
) -> None:
    """Writes ``dst``, which is absent until all is written; one matrix is in memory at a time.

    Args:
        src: a folder in gptq or int4 codes of one number of bits and one group size.
        dst: the folder to make.
        is_v2: write ``checkpoint_format`` gptq_v2, which older readers do not know; needed where
            a zero point is 0.
        made: how the codes were made.
        max_shard_bytes: of the tensors in one file.
        note: called with one line for each small file that is left behind.

    Raises:
        MixtralError: exit codes 65 (codes that the layout cannot hold), 66 (no source), 73
            (``dst`` exists), 74 (disk).
    """
    src, dst = Path(src), Path(os.path.abspath(dst))
    check_destination(dst, src)
    if dst.exists() and any(dst.iterdir()):
        raise refuse_existing(dst)
    config = read_config(src, note=note)
    specs = leaf_specs(config)
    with contextlib.closing(open_leaves(src, specs, head_dim=config.head_dim, note=note)) as leaves:
        export = _Export(leaves, specs, src, is_v2=is_v2)
        check_disk(dst.parent, export.num_bytes, dst)
        names = find_companions(src, note)
        work = Path(tempfile.mkdtemp(prefix=f"{dst.name}.", suffix=".saving", dir=dst.parent))
        try:
            os.chmod(work, 0o755)  # of mkdtemp: for nobody else
            files = export.write(work, max_shard_bytes)
            dtype = export.dtype.name
            copy_companions(src, work, names, config=config, dtype=dtype)
            _describe(work, export.settings(made), files)
            sync_folder(work)
            with contextlib.suppress(FileNotFoundError):
                dst.rmdir()
            os.rename(work, dst)
            sync_folder(dst.parent)
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(dst.parent) from error
            raise
        finally:
            shutil.rmtree(work, ignore_errors=True)


class _Export:
    def __init__(self, leaves: Leaves, specs: Mapping[str, LeafSpec], src: Path, *, is_v2: bool):
        self.leaves, self.src, self.is_v2 = leaves, src, is_v2
        self.pieces = list(pieces(PUBLISHED, specs))
        self.quantized = quantized_weights(leaves.specs, np.dtype(np.float16))
        self.bits, self.group_size = self._one_setting()
        stored = {leaf: leaves.dtype(leaf) for leaf in specs if leaf in leaves.specs}
        self.dtype = common_dtype(specs, stored, preferred="float16")
        self.num_bytes = sum(t.size for piece in self.pieces for t in self.tensors(piece))

    def _one_setting(self) -> tuple[int, int]:
        """Bits and group size (-1 for one group), which the layout has once for all weights."""
        found = {(q.scheme, q.shape[-1], q.scales.shape[-1]) for q in self.quantized.values()}
        bits = {SCHEMES[scheme].bits if _is_held(scheme) else 0 for scheme, _, _ in found}
        sizes = {inputs // groups for _, inputs, groups in found if groups > 1} or {-1}
        size = min(sizes)
        # One group is all inputs, or one that is not full.
        fits = all(size == -1 or groups > 1 or inputs <= size for _, inputs, groups in found)
        if len(bits) != 1 or 0 in bits or len(sizes) != 1 or not fits:
            schemes = sorted(f"{s} in groups of {inputs // groups}" for s, inputs, groups in found)
            raise MixtralError(
                f"{self.src}: the GPTQ layout",
                expected="weights in one of gptq2, gptq3, gptq4, gptq8 and int4, in one group size",
                got=", ".join(schemes) or "no quantized weight",
                fix="quantize with --scheme gptq or int4",
                code=BAD_DATA,
            )
        return bits.pop(), size

    def settings(self, made: Made) -> dict[str, Any]:
        """The fields of quantize_config.json."""
        version = {"checkpoint_format": "gptq_v2"} if self.is_v2 else {}
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "damp_percent": made.damp_percent,
            "desc_act": any(q.order is not None for q in self.quantized.values()),
            "sym": all(q.zeros is None for q in self.quantized.values()),
            "true_sequential": made.true_sequential,
            "model_name_or_path": None,
            "model_file_base_name": "model",
            **version,
        }

    def tensors(self, piece: Piece) -> list[_Tensor]:
        """What stands for a piece of the table in the files."""
        name, leaf = piece.rows.tensor, piece.chunk.leaf
        if leaf not in self.quantized:
            return [_Tensor(name, piece.tensor_shape, self.leaves.dtype(leaf))]
        rows, inputs = piece.tensor_shape
        groups = self.quantized[leaf].scales.shape[-1]
        stem, words = name.removesuffix(".weight"), np.dtype(np.int32)
        return [
            _Tensor(f"{stem}.qweight", (inputs * self.bits // WORD_BITS, rows), words),
            _Tensor(f"{stem}.qzeros", (groups, rows * self.bits // WORD_BITS), words),
            _Tensor(f"{stem}.scales", (groups, rows), np.dtype(np.float16)),
            _Tensor(f"{stem}.g_idx", (inputs,), words),
        ]

    def values(self, piece: Piece) -> Iterator[np.ndarray]:
        """The arrays of ``tensors``, in their order."""
        leaf = piece.chunk.leaf
        if leaf not in self.quantized:
            yield read_chunk(self.leaves, piece.chunk)
            return
        q = read_matrix(self.leaves, piece.chunk, parts_of(leaf, self.leaves.specs), self.dtype)
        try:
            found = encode(q, is_v2=self.is_v2)
        except ValueError as error:
            name = self.leaves.source_name(piece.chunk)
            raise MixtralError(f"{name}: {error}", code=BAD_DATA) from None
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            yield found[part]

    def write(self, folder: Path, max_shard_bytes: int) -> dict[str, list[_Tensor]]:
        """Writes the tensors, file by file; tells which lie where."""
        groups: list[list[Piece]] = [[]]
        used = 0
        for piece in self.pieces:
            size = sum(tensor.size for tensor in self.tensors(piece))
            if groups[-1] and used + size > max_shard_bytes:
                groups.append([])
                used = 0
            groups[-1].append(piece)
            used += size
        files = {}
        for k, group in enumerate(groups, 1):
            several = f"model-{k:05}-of-{len(groups):05}.safetensors"
            name = several if len(groups) > 1 else SINGLE_NAME
            files[name] = [tensor for piece in group for tensor in self.tensors(piece)]
            with open(folder / name, "wb") as file:
                file.write(_header(files[name]))
                for piece in group:
                    for tensor, value in zip(self.tensors(piece), self.values(piece), strict=True):
                        assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
                        file.write(bytes_of(np.ascontiguousarray(value)))
                file.flush()
                os.fsync(file.fileno())
        return files


def _is_held(scheme: str) -> bool:
    """Whether the layout has codes of a scheme: numbers with a zero point."""
    row = SCHEMES[scheme]
    return row.table is None and not row.is_signed


def _header(tensors: list[_Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _describe(folder: Path, settings: dict[str, Any], files: dict[str, list[_Tensor]]) -> None:
    """Writes quantize_config.json, quantization_config, and an index if there are several files."""
    write_durably(folder / QUANTIZE_NAME, json.dumps(settings, indent=2).encode())
    path = folder / CONFIG_NAME
    config = json.loads(path.read_bytes())
    config["quantization_config"] = {"quant_method": "gptq", **settings}
    write_durably(path, json.dumps(config, indent=2).encode())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(t.size for found in files.values() for t in found)},
            "weight_map": {t.name: name for name, found in files.items() for t in found},
        }
        write_durably(folder / INDEX_NAME, json.dumps(index, indent=2).encode())
