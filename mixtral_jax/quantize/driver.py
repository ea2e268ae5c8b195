"""quantize(): a checkpoint to a folder of ours in few bits, atomically and in bounded memory."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from mixtral_jax.config import read_config
from mixtral_jax.convert.driver import OUTPUT_NAME, WORK_SUFFIX, convert
from mixtral_jax.convert.hub import resolve
from mixtral_jax.convert.leaves import Leaves, is_checkpoint, open_leaves
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.convert.options import ConvertOptions, ConvertReport
from mixtral_jax.convert.orbax import read_leaf
from mixtral_jax.convert.parts import quantized_weights, split_path
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.qtensor import SCHEMES
from mixtral_jax.quantize.calibration import read_windows
from mixtral_jax.quantize.coverage import Coded, Row, check_experts, coded, coverage
from mixtral_jax.quantize.errors import MatrixError
from mixtral_jax.quantize.gptq_leaves import GptqLeaves
from mixtral_jax.quantize.gptq_matrices import Calibrated
from mixtral_jax.quantize.gptq_report import LayerReport
from mixtral_jax.quantize.makers import Recipe
from mixtral_jax.quantize.recorded import errors_of, layers_of
from mixtral_jax.quantize.source import QuantizingLeaves
from mixtral_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What was quantized.

    Attributes:
        converted: of the folder, as ``convert`` reports it.
        coverage: of what was written.
        errors: of each quantized weight, made by this call or an earlier one.
        layers: of GPTQ, what calibration saw of each layer.
        coded: of rows that are coded, the codewords used; None where there are none.
    """

    converted: ConvertReport
    coverage: list[Row]
    errors: dict[str, MatrixError]
    layers: list[LayerReport] = dataclasses.field(default_factory=list)
    coded: Coded | None = None


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    recipe: Recipe,
    *,
    verify: bool = False,
    note: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> QuantizeReport:
    """Quantizes attention and experts; router, norms, embeddings and head stay as they are.

    qmoe quantizes experts only.

    Everything that ``convert`` promises holds: ``dst`` is absent or complete, an interrupted call
    is resumed by the same call, and memory stays below twice the largest leaf plus 512 MB.

    Args:
        src: as for ``convert``.
        dst: the folder to make.
        recipe: how.
        verify: read every leaf back.
        note: as for ``convert``.
        progress: as for ``convert``.
        stop: as for ``convert``.

    Raises:
        MixtralError: as ``convert``; exit code 65 for a source that is quantized already or has
            NaN or infinite values, 78 for rows of no whole groups.
    """

    def change(leaves: Leaves) -> Leaves:
        return QuantizingLeaves(leaves, recipe, measure=True)

    options = ConvertOptions(verify=verify)
    converted = convert(src, dst, options, note=note, progress=progress, stop=stop, change=change)
    return _report(converted, Path(dst), SCHEMES[recipe.codes].bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which text GPTQ reads.

    Attributes:
        path: a .txt or .jsonl file (``calibration.read_windows``).
        samples: windows at most.
        length: tokens of a window at most.
    """

    path: str | Path | None = None
    samples: int = 128
    length: int = 2048

    def __post_init__(self):
        for name, least in (("samples", 1), ("length", 2)):
            got = getattr(self, name)
            if got < least:
                raise MixtralError(f"--{name}", expected=f"at least {least}", got=got, code=USAGE)


def quantize_gptq(
    src: str | Path,
    dst: str | Path,
    recipe: Calibrated,
    calibration: Calibration,
    *,
    verify: bool = False,
    note: Callable[[str], None] = lambda line: None,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> QuantizeReport:
    """``quantize_checkpoint`` with GPTQ, which fits codes to what the layers read and write.

    ``dst`` is absent or complete, and an interrupted call is resumed by the same call, which makes
    the layer again that was not finished. The source is read once before the first layer, so that
    damage shows early. In memory there are one layer in few bits; a matrix, its Hessian and 3.6
    times the Hessian beside them in float32 on the device; and three copies of the residual stream
    of the text. The digest is the same on the same machine only: sums differ between devices.

    Args:
        src: as for ``convert``; it must have a tokenizer.
        dst: the folder to make.
        recipe: how.
        calibration: text like that which the model will read.
        verify: read every leaf back; a finished folder is quantized again and compared.
        note: as for ``convert``; one line for each layer too.
        say: called with what is being done, often.
        progress: as for ``convert``.
        stop: as for ``convert``, asked before each matrix too.

    Raises:
        MixtralError: as ``quantize_checkpoint`` and ``calibration.read_windows``; exit code 66
            without a tokenizer, 65 if no damping lets a Hessian be factored.
    """
    folder = resolve(src, note).folder
    is_checkpoint(folder)  # before anything is said of its tokenizer
    tokenizer = Tokenizer.from_folder(folder)
    windows = read_windows(
        calibration.path, tokenizer, samples=calibration.samples, length=calibration.length
    )
    config = read_config(folder, note=lambda line: None)
    count = sum(map(len, windows))
    note(f"calibration: {len(windows)} windows, {count:,} tokens of {calibration.path}")
    if len(windows) < calibration.samples:
        note(f"the text has fewer windows than --samples {calibration.samples}: all are used")
    written = Path(f"{os.path.abspath(dst)}{WORK_SUFFIX}") / OUTPUT_NAME

    def change(leaves: Leaves) -> Leaves:
        return GptqLeaves(
            leaves, config, recipe, windows, written=written, note=note, say=say, stop=stop
        )

    options = ConvertOptions(verify=verify)
    converted = convert(src, dst, options, progress=progress, note=note, stop=stop, change=change)
    return _report(converted, Path(dst), SCHEMES[recipe.scheme].bits)


def _report(converted: ConvertReport, folder: Path, bits: int) -> QuantizeReport:
    """What the folder's manifest says of it; proves that all experts are there."""
    records = read_manifest(folder).leaves
    return QuantizeReport(
        converted=converted,
        coverage=_coverage(folder, bits),
        errors=errors_of(records),
        layers=layers_of(records),
        coded=_coded(folder),
    )


def _coverage(folder: Path, bits: int) -> list[Row]:
    """Counts what the folder's files hold, not what their maker meant to write.

    Opening it finds every array in the shape and size that is counted here. Proves that all experts
    are there.
    """
    config = read_config(folder, note=lambda line: None)
    specs = leaf_specs(config)
    with contextlib.closing(open_leaves(folder, specs, head_dim=config.head_dim)) as leaves:
        stored = leaves.specs
        plain = {
            path: jax.ShapeDtypeStruct(stored[path].shape, leaves.dtype(path))
            for path in specs
            if path in stored
        }
        weights = plain | quantized_weights(stored, None)
    check_experts(weights, specs, bits=bits)
    return coverage(weights, specs)


def _coded(folder: Path) -> Coded | None:
    """Counts the codewords of a folder, leaf by leaf."""
    total = Coded()
    for path in read_manifest(folder).leaves:
        part = split_path(path)
        if part is not None and part.part == "codes" and SCHEMES[part.scheme].is_coded:
            total += coded(part.scheme, np.asarray(read_leaf(folder, path)))
    return total if total.held else None
