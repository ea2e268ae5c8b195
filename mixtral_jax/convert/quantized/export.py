"""Writes a checkpoint of ours in GPTQ codes as the published GPTQ layout, for every other tool.

Names are the original ones; quantize_config.json and the quantization_config of config.json say
what AutoGPTQ and transformers need (see docs/formats.md).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixtral_jax.config import CONFIG_NAME, read_config
from mixtral_jax.convert.companions import copy_companions, find_companions
from mixtral_jax.convert.dequantized import read_chunk
from mixtral_jax.convert.leaves import Leaves, common_dtype, open_leaves
from mixtral_jax.convert.manifest import LeafRecord, fold, write_durably
from mixtral_jax.convert.memory import PeakMemory
from mixtral_jax.convert.names import PUBLISHED, Chunk, Piece, pieces
from mixtral_jax.convert.options import ConvertReport
from mixtral_jax.convert.output import new_folder
from mixtral_jax.convert.parts import join, parts_of, quantized_weights
from mixtral_jax.convert.preflight import check_absent
from mixtral_jax.convert.quantized.form import DTYPES, Note
from mixtral_jax.convert.quantized.gptq import WORD_BITS, encode
from mixtral_jax.convert.reader import INDEX_NAME, SINGLE_NAME
from mixtral_jax.convert.safetensors_file import bytes_of, encode_header
from mixtral_jax.convert.transfer import sha256
from mixtral_jax.errors import BAD_DATA, MixtralError, interrupted
from mixtral_jax.model.transformer import LeafSpec, leaf_specs
from mixtral_jax.qtensor import SCHEMES

QUANTIZE_NAME = "quantize_config.json"
# Modules of the first layer; of its experts.
_IN_LAYER = re.compile(r"model\.layers\.0\.(.*)\.weight")
_EXPERT = re.compile(r"block_sparse_moe\.experts\.\d+\.w[123]")
_CODES = {dtype: name for name, dtype in DTYPES.items()}


class Made(NamedTuple):
    """How the codes were made, for quantize_config.json; it touches no reader of the files."""

    damp_percent: float = 0.01
    true_sequential: bool = False

    @classmethod
    def of(cls, leaves: Leaves) -> Made:
        """What the manifest of a folder of ours says, if GPTQ made it."""
        made = leaves.manifest.fingerprint.get("files") if leaves.manifest is not None else None
        recipe = made.get("gptq") if isinstance(made, dict) else None
        damp = recipe.get("damp") if isinstance(recipe, dict) else None
        # GPTQ of ours fits each matrix to what the quantized ones before it give.
        return cls(damp, True) if isinstance(damp, float) else cls()


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
    is_v2: bool | None = None,
    made: Made | None = None,
    max_shard_bytes: int = 5 * 10**9,
    note: Note = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> ConvertReport:
    """Writes ``dst``, which is absent until all is written; one matrix is in memory at a time.

    Args:
        src: a folder in gptq or int4 codes of one number of bits and one group size.
        dst: the folder to make.
        is_v2: write ``checkpoint_format`` gptq_v2, which older readers do not know. None: where a
            zero point is 0, which the first version has no place for.
        made: how the codes were made; None: as the manifest of ``src`` says.
        max_shard_bytes: of the tensors in one file.
        note: called with one line for each thing a person should know: small files that are left
            behind, scales that float16 rounds.
        progress: called with bytes done and bytes in all.
        stop: asked before each matrix; True ends the work there, and nothing is left of it.

    Returns:
        The report; its digest is of the codes as they lie in ``src``.

    Raises:
        MixtralError: exit codes 65 (codes that the layout cannot hold), 66 (no source), 73
            (``dst`` exists), 74 (disk), 75 (stopped).
    """
    src, dst = Path(src), Path(os.path.abspath(dst))
    check_absent(dst, src)
    started, config = time.monotonic(), read_config(src, note=note)
    specs = leaf_specs(config)
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(PeakMemory())
        leaves = open_leaves(src, specs, head_dim=config.head_dim, note=note)
        stack.callback(leaves.close)
        export = _Export(leaves, specs, src, is_v2=is_v2, note=note)
        names = find_companions(src, note)
        with new_folder(dst, export.num_bytes) as work:
            files = export.write(work, max_shard_bytes, progress, stop)
            copy_companions(src, work, names, config=config, dtype=export.dtype.name)
            _describe(work, export.settings(made or Made.of(leaves)), export.modules(), files)
        export.tell_rounding(note)
    return ConvertReport(
        parameters=sum(math.prod(spec.shape) for spec in specs.values()),
        tensors=sum(map(len, files.values())),
        bytes=export.num_bytes,
        seconds=time.monotonic() - started,
        peak_rss_bytes=memory.bytes,
        digest=export.digest(),
    )


class _Export:
    def __init__(
        self,
        leaves: Leaves,
        specs: Mapping[str, LeafSpec],
        src: Path,
        *,
        is_v2: bool | None,
        note: Note,
    ):
        self.leaves, self.src = leaves, src
        self.pieces = list(pieces(PUBLISHED, specs))
        self.quantized = quantized_weights(leaves.specs, np.dtype(np.float16))
        self.bits, self.group_size = self._one_setting()
        stored = {leaf: leaves.dtype(leaf) for leaf in specs if leaf in leaves.specs}
        self.dtype = common_dtype(specs, stored, preferred="float16")
        self.num_bytes = sum(t.size for piece in self.pieces for t in self.tensors(piece))
        self.is_v2 = self._needs_v2(note) if is_v2 is None else is_v2
        self._digests: dict[str, list[str]] = {}
        self._num_scales = self._num_rounded = 0
        self._worst = 0.0  # relative change of a scale that float16 rounds

    def _needs_v2(self, note: Note) -> bool:
        """Whether some zero point is 0: the first version stores zero points less one."""
        for piece in self.pieces:
            path = parts_of(piece.chunk.leaf, self.leaves.specs).get("zeros")
            if path is None:
                continue
            if not read_chunk(self.leaves, Chunk(str(path), piece.chunk.expert)).all():
                note("zero points of 0: written as gptq_v2, which older readers do not know")
                return True
        return False

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

    def modules(self) -> list[list[str]]:
        """The quantized modules of a layer: those that read the same inputs, then expert by expert.

        As ``modules_in_block_to_quantize`` of the published configurations lists them.
        """
        first = [p for p in self.pieces if p.chunk.leaf in self.quantized]
        names = [match[1] for p in first if (match := _IN_LAYER.fullmatch(p.rows.tensor))]
        names = list(dict.fromkeys(names))
        attention = [[f"self_attn.{n}_proj" for n in group] for group in ("kvq", "o")]
        experts: dict[str, list[str]] = {}
        for name in sorted(name for name in names if _EXPERT.fullmatch(name)):
            experts.setdefault(name.rpartition(".")[0], []).append(name)
        ordered = sorted(experts.values(), key=lambda group: int(group[0].split(".")[2]))
        found = [[name for name in group if name in names] for group in (*attention, *ordered)]
        return [group for group in found if group]

    def values(self, piece: Piece) -> Iterator[np.ndarray]:
        """The arrays of ``tensors``, in their order."""
        leaf = piece.chunk.leaf
        if leaf not in self.quantized:
            yield self._read(piece.chunk)
            return
        parts = parts_of(leaf, self.leaves.specs)
        found = {n: self._read(Chunk(str(p), piece.chunk.expert)) for n, p in parts.items()}
        q = join(self.quantized[leaf].scheme, found, self.dtype)
        try:
            encoded = encode(q, is_v2=self.is_v2)
        except ValueError as error:
            name = self.leaves.source_name(piece.chunk)
            raise MixtralError(f"{name}: {error}", code=BAD_DATA) from None
        self._count_rounding(np.asarray(q.scales, np.float32), encoded["scales"].T)
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            yield encoded[part]

    def _read(self, chunk: Chunk) -> np.ndarray:
        value = read_chunk(self.leaves, chunk)
        self._digests.setdefault(chunk.leaf, []).append(sha256(value))
        return value

    def digest(self) -> str:
        """The digest of what was read, once all is written."""
        records = {
            leaf: LeafRecord(
                shape=tuple(self.leaves.specs[leaf].shape),
                dtype=self.leaves.dtype(leaf).name,
                chunks=tuple(chunks),
            )
            for leaf, chunks in self._digests.items()
        }
        return fold(records)

    def _count_rounding(self, scales: np.ndarray, halves: np.ndarray) -> None:
        change = np.abs(halves.astype(np.float32) - scales)
        self._num_scales += scales.size
        self._num_rounded += np.count_nonzero(change)
        relative = change[change > 0] / np.abs(scales[change > 0])
        self._worst = max(self._worst, float(relative.max(initial=0)))

    def tell_rounding(self, note: Note) -> None:
        """Says what float16 did to small scales."""
        if self._num_rounded:
            count = f"{self._num_rounded:,} of {self._num_scales:,} scales"
            note(f"{count} are rounded to float16, by at most {self._worst:.2g} of themselves")

    def write(
        self,
        folder: Path,
        max_shard_bytes: int,
        progress: Callable[[int, int], None],
        stop: Callable[[], bool],
    ) -> dict[str, list[_Tensor]]:
        """Writes the tensors, file by file; tells which lie where."""
        done = 0
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
                    if stop():
                        raise interrupted()
                    for tensor, value in zip(self.tensors(piece), self.values(piece), strict=True):
                        assert (value.shape, value.dtype) == (tensor.shape, tensor.dtype)
                        file.write(bytes_of(np.ascontiguousarray(value)))
                        done += tensor.size
                        progress(done, self.num_bytes)
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
    return encode_header(entries)


def _describe(
    folder: Path,
    settings: dict[str, Any],
    modules: list[list[str]],
    files: dict[str, list[_Tensor]],
) -> None:
    """Writes quantize_config.json, quantization_config, and an index if there are several files."""
    write_durably(folder / QUANTIZE_NAME, json.dumps(settings, indent=2).encode())
    path = folder / CONFIG_NAME
    config = json.loads(path.read_bytes())
    listed = {"modules_in_block_to_quantize": modules}
    config["quantization_config"] = {"quant_method": "gptq", **settings, **listed}
    write_durably(path, json.dumps(config, indent=2).encode())
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(t.size for found in files.values() for t in found)},
            "weight_map": {t.name: name for name, found in files.items() for t in found},
        }
        write_durably(folder / INDEX_NAME, json.dumps(index, indent=2).encode())
