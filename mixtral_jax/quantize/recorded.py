"""How weights turned out, as it is kept with their records: a resumed run reports all of them.

What is said of a weight lies with the record of its codes, in the journal and in manifest.json.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from mixtral_jax.convert.manifest import AGAIN, LeafRecord
from mixtral_jax.convert.names import Chunk
from mixtral_jax.convert.parts import split_path
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.quantize.errors import MatrixError, by_weight
from mixtral_jax.quantize.gptq_report import LayerReport, OutputError


def weight_of_codes(leaf: str) -> str | None:
    """The weight whose codes a leaf is; None for all other leaves."""
    part = split_path(leaf)
    return part.weight if part is not None and part.part == "codes" else None


def recorded(
    leaf: str, errors: Mapping[Chunk, MatrixError], layer: LayerReport | None = None
) -> dict[str, Any] | None:
    """What is kept with a leaf, for JSON; None but for codes.

    Args:
        leaf: of which all chunks have been made.
        errors: of matrices; those of its weight are taken.
        layer: what GPTQ has to say of the layer that it belongs to.
    """
    weight = weight_of_codes(leaf)
    own = {chunk: error for chunk, error in errors.items() if chunk.leaf == weight}
    if weight is None or not own:
        return None
    in_order = sorted(own, key=lambda chunk: chunk.expert or 0)  # threads made them in any order
    error = by_weight({chunk: own[chunk] for chunk in in_order})[weight]
    found: dict[str, Any] = {"error": dataclasses.asdict(error)}
    if layer is not None:
        found["output"] = dataclasses.asdict(layer.outputs[weight])
        fields = ("layer", "tokens", "few_tokens", "threshold")
        found["layer"] = {name: getattr(layer, name) for name in fields}
    return found


def errors_of(records: Mapping[str, LeafRecord]) -> dict[str, MatrixError]:
    """The error of each quantized weight that has one on record.

    Raises:
        MixtralError: exit code 65 for a record that was altered.
    """
    found = {
        Chunk(weight, None): _read(MatrixError, report.get("error"))
        for weight, report in _reports(records)
    }
    return by_weight(found)


def layers_of(records: Mapping[str, LeafRecord]) -> list[LayerReport]:
    """What GPTQ recorded of each layer; none of what another scheme made.

    Raises:
        MixtralError: as ``errors_of``.
    """
    facts: dict[int, Any] = {}
    outputs: dict[int, dict[str, OutputError]] = {}
    for weight, report in _reports(records):
        if "layer" not in report:
            continue
        fact = _read(_Layer, report["layer"])
        facts[fact.layer] = fact
        outputs.setdefault(fact.layer, {})[weight] = _read(OutputError, report.get("output"))
    return [
        LayerReport(
            layer=layer,
            tokens=tuple(fact.tokens),
            few_tokens=tuple(fact.few_tokens),
            threshold=fact.threshold,
            outputs=outputs[layer],
        )
        for layer, fact in sorted(facts.items())
    ]


@dataclasses.dataclass(frozen=True)
class _Layer:
    layer: int
    tokens: list[int]
    few_tokens: list[int]
    threshold: int


def _reports(records: Mapping[str, LeafRecord]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for leaf, record in records.items():
        weight = weight_of_codes(leaf)
        if weight is not None and record.report is not None:
            yield weight, record.report


def _read(kind: Any, fields: Any) -> Any:
    try:
        return kind(**fields)
    except TypeError:
        what = f"manifest.json: the report of a weight is no {kind.__name__.strip('_')}"
        raise MixtralError(what, fix=AGAIN, code=BAD_DATA) from None
