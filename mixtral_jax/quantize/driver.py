"""quantize(): a checkpoint to a folder of ours in few bits, atomically and in bounded memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from mixtral_jax.config import read_config
from mixtral_jax.convert.driver import convert
from mixtral_jax.convert.leaves import Leaves
from mixtral_jax.convert.manifest import read_manifest
from mixtral_jax.convert.options import ConvertOptions, ConvertReport
from mixtral_jax.convert.parts import quantized_weights, stored_specs
from mixtral_jax.convert.safetensors_file import np_dtype
from mixtral_jax.model.transformer import leaf_specs
from mixtral_jax.qtensor import SCHEMES
from mixtral_jax.quantize.coverage import Row, check_experts, coverage
from mixtral_jax.quantize.errors import MatrixError, by_weight
from mixtral_jax.quantize.makers import Recipe
from mixtral_jax.quantize.source import QuantizingLeaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """What was quantized.

    Attributes:
        converted: of the folder, as ``convert`` reports it.
        coverage: of what was written.
        errors: of each weight that this call quantized; an interrupted call's are not kept.
    """

    converted: ConvertReport
    coverage: list[Row]
    errors: dict[str, MatrixError]


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
    sources: list[QuantizingLeaves] = []

    def change(leaves: Leaves) -> Leaves:
        sources.append(QuantizingLeaves(leaves, recipe, measure=True))
        return sources[-1]

    options = ConvertOptions(verify=verify)
    converted = convert(src, dst, options, note=note, progress=progress, stop=stop, change=change)
    return QuantizeReport(
        converted=converted,
        coverage=_coverage(Path(dst), SCHEMES[recipe.scheme].bits),
        errors=by_weight(sources[0].errors),
    )


def _coverage(folder: Path, bits: int) -> list[Row]:
    """Counts what the folder's manifest says it holds, and proves that all experts are there."""
    specs = leaf_specs(read_config(folder, note=lambda line: None))
    records = read_manifest(folder).leaves
    stored = stored_specs(specs, records)
    plain = {
        path: jax.ShapeDtypeStruct(records[path].shape, np_dtype(records[path].dtype))
        for path in specs
        if path in stored
    }
    weights = plain | quantized_weights(stored, None)
    check_experts(weights, specs, bits=bits)
    return coverage(weights, specs)
