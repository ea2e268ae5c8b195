"""What is kept with the records of quantized weights, there and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mixtral_jax.convert.manifest import LeafRecord
from mixtral_jax.convert.names import Chunk
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.quantize.errors import MatrixError
from mixtral_jax.quantize.gptq_report import LayerReport, OutputError
from mixtral_jax.quantize.recorded import errors_of, layers_of, recorded

WEIGHT = "layers.1.moe.experts.up"
ERRORS = {Chunk(WEIGHT, e): MatrixError(0.5 + e, 4.0, 0.1 * e) for e in (2, 0, 1)}
LAYER = LayerReport(
    layer=1,
    tokens=(5, 6, 7),
    few_tokens=(0,),
    threshold=6,
    outputs={WEIGHT: OutputError(1.0, 2.0, 4.0)},
)


def stored(report: dict | None, leaf: str = f"{WEIGHT}.gptq3.codes") -> dict[str, LeafRecord]:
    """As the journal and the manifest keep it: through JSON."""
    record = LeafRecord(shape=(3, 4, 6), dtype="uint8", chunks=("a", "b", "c"), report=report)
    return {leaf: LeafRecord.of(json.loads(json.dumps(dataclasses.asdict(record))))}


def test_errors_and_layers_come_back():
    records = stored(recorded(f"{WEIGHT}.gptq3.codes", ERRORS, LAYER))
    assert errors_of(records) == {WEIGHT: MatrixError(4.5, 12.0, 0.2)}
    assert layers_of(records) == [LAYER]
    without = stored(recorded(f"{WEIGHT}.nf4.codes", ERRORS), f"{WEIGHT}.nf4.codes")
    assert layers_of(without) == []
    assert errors_of(without) == errors_of(records)


def test_only_codes_of_what_was_measured_have_a_report():
    assert recorded(f"{WEIGHT}.nf4.scales", ERRORS) is None
    assert recorded("norm.weight", ERRORS) is None
    assert recorded("layers.0.moe.experts.up.nf4.codes", ERRORS) is None


@pytest.mark.parametrize(
    ("read", "report"),
    [
        (errors_of, {}),
        (errors_of, {"error": 3}),
        (errors_of, {"error": {"squared": 1.0, "other": 2.0}}),
        (layers_of, {"layer": []}),
    ],
)
def test_an_altered_report_is_refused(read, report):
    with pytest.raises(MixtralError, match="the report of a weight is no") as refusal:
        read(stored(report))
    assert refusal.value.code == BAD_DATA


def test_a_report_of_another_type_is_no_record():
    with pytest.raises(TypeError):
        stored("words")  # type: ignore[arg-type]
