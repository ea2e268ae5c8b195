"""Quantization while a checkpoint loads, and what is told of any quantized checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mixtral_jax.convert.leaves import Leaves
from mixtral_jax.convert.parts import split_path
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.model.transformer import LeafSpec
from mixtral_jax.qtensor import SCHEMES
from mixtral_jax.quantize.coverage import check_experts, coverage, lines
from mixtral_jax.quantize.makers import Recipe
from mixtral_jax.quantize.source import QuantizingLeaves


def quantizing(scheme: str | None, *, verify: bool) -> Callable[[Leaves], Leaves]:
    """What ``load_weights`` reads where a scheme is asked for.

    A checkpoint that is in that scheme already is read as it is; one in another raises a
    MixtralError of exit code 65.
    """

    def source(leaves: Leaves) -> Leaves:
        if scheme is None:
            return leaves
        parts = [part for part in map(split_path, leaves.specs) if part is not None]
        if not parts:
            return QuantizingLeaves(leaves, Recipe(scheme=scheme), verify=verify)
        others = sorted({part.scheme for part in parts} - {scheme})
        if others:
            raise MixtralError(
                f"--quantize {scheme}: {parts[0].weight} is quantized already",
                expected=f"a checkpoint in {scheme} or in 16 or 32 bits",
                got=others[0],
                fix="leave out --quantize, or quantize the checkpoint that it was made from",
                code=BAD_DATA,
            )
        return leaves

    return source


def report(
    weights: Mapping[str, Any],
    specs: Mapping[str, LeafSpec],
    asked: str | None,
    note: Callable[[str], None],
) -> None:
    """Prints the coverage of weights that are, or should be, quantized.

    Raises:
        MixtralError: exit code 65 if not all experts are in the bits that were asked for; where
            none were asked, if some weights are quantized but not all experts.
    """
    rows = coverage(weights, specs)
    if asked is None and not any(row.scheme in SCHEMES for row in rows):
        return
    for line in lines(rows):
        note(line)
    check_experts(weights, specs, bits=None if asked is None else SCHEMES[asked].bits)
