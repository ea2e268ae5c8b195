"""Quantized weights as sets of arrays: what each part is called, and what shape it has.

The parts of the weight ``layers.0.moe.experts.gate`` in NF4 are the leaves
``layers.0.moe.experts.gate.nf4.codes``, ``.nf4.scales`` and so on: the path tells the scheme, so
the digest of a checkpoint covers it, and each weight may have a scheme of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax import ternary_code
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.model.transformer import LeafSpec
from mixtral_jax.qtensor import NESTED_BLOCK, SCHEMES, Nested, QTensor, inputs_of, packed_size

# Part -> its dims after those of the stack: O rows, I inputs, P packed inputs, G groups, N blocks
# of nested scales. Nested scales are scale_codes, scale_absmax and scale_offset.
PARTS = {
    "codes": "OP",
    "scales": "OG",
    "zeros": "OG",
    "order": "I",
    "scale_codes": "OG",
    "scale_absmax": "N",
    "scale_offset": "1",
}
_INTEGERS = {"zeros": "uint8", "order": "int32", "scale_codes": "uint8"}
_NESTED = {"scale_codes", "scale_absmax", "scale_offset"}


class PartPath(NamedTuple):
    """The path of a part, taken apart."""

    weight: str
    scheme: str
    part: str

    def __str__(self):
        return ".".join(self)


def split_path(path: str) -> PartPath | None:
    """The weight, scheme and part of a path; None if it is not that of a part."""
    pieces = path.rsplit(".", 2)
    if len(pieces) == 3 and pieces[1] in SCHEMES and pieces[2] in PARTS:
        return PartPath(*pieces)
    return None


def parts_of(weight: str, paths: Iterable[str]) -> dict[str, PartPath]:
    """The parts of a weight among paths, by their names."""
    found = (split_path(path) for path in paths)
    return {path.part: path for path in found if path is not None and path.weight == weight}


def stored_specs(specs: Mapping[str, LeafSpec], records: Mapping[str, Any]) -> dict[str, LeafSpec]:
    """What a folder holds in place of weights: those that are quantized are replaced by parts.

    A part whose shape or dtype does not fit its weight is given the shape that it should have, so
    that comparing it with the record tells; a set of parts that is not whole lists what it lacks.

    Args:
        specs: what the model needs.
        records: shape and dtype of what is stored, by path.
    """
    parts: dict[str, list[PartPath]] = {}
    for path in records:
        part = split_path(path)
        if part is not None and part.weight in specs:
            parts.setdefault(part.weight, []).append(part)
    found: dict[str, LeafSpec] = {}
    for weight, spec in specs.items():
        if weight in records or weight not in parts:
            found[weight] = spec
        else:
            found |= _part_specs(spec, parts[weight], records)
    return found


def _part_specs(
    spec: LeafSpec, parts: list[PartPath], records: Mapping[str, Any]
) -> dict[str, LeafSpec]:
    """The specs of a weight's parts as recorded, and of those that must be there as well."""
    weight, scheme, _ = parts[0]
    names = {part.part for part in parts if part.scheme == scheme}
    names |= {"codes"} | (_NESTED if names & _NESTED else {"scales"})
    scales = "scale_codes" if "scale_codes" in names else "scales"
    record = records.get(str(PartPath(weight, scheme, scales)))
    groups = record.shape[-1] if record is not None and record.shape else 1
    if not groups or spec.shape[-1] % groups:
        groups = 1  # what was recorded cannot be, so it must differ from what is told here
    found = {}
    for name in PARTS:
        if name in names:
            path = str(PartPath(weight, scheme, name))
            own = records.get(path)
            stored = None if own is None else str(np.dtype(own.dtype).name)
            found[path] = part_spec(spec, scheme, name, groups, stored)
    return found


def part_spec(spec: LeafSpec, scheme: str, part: str, groups: int, dtype: Any = None) -> LeafSpec:
    """Shape, axes and dtype of a part of a weight.

    Args:
        spec: the weight's.
        scheme: a key of ``SCHEMES``.
        part: a key of ``PARTS``.
        groups: per row.
        dtype: of scales; float32 unless given.
    """
    *stack, outputs, inputs = spec.shape
    *stack_axes, out, summed = spec.axes
    sizes = {
        "O": outputs,
        "I": inputs,
        "P": packed_size(scheme, inputs),
        "G": groups,
        "N": -(-outputs * groups // NESTED_BLOCK),
        "1": 1,
    }
    names = {"O": out, "I": summed, "P": summed, "G": summed, "N": "", "1": ""}
    letters = PARTS[part]
    fixed = SCHEMES[scheme].storage if part == "codes" else _INTEGERS.get(part)
    return LeafSpec(
        (*stack, *(sizes[letter] for letter in letters)),
        (*stack_axes, *(names[letter] for letter in letters)),
        jnp.dtype(fixed or dtype or "float32"),
    )


def check_codes(path: str, name: str, codes: np.ndarray) -> None:
    """Refuses coded rows that are not of as many inputs as they stand for (exit code 65).

    Args:
        path: of the part.
        name: of what the rows are read from.
        codes: whole rows of the part.
    """
    part = split_path(path)
    if part is None or part.part != "codes" or not SCHEMES[part.scheme].is_coded:
        return
    num_inputs = inputs_of(part.scheme, codes.shape[-1])
    if not ternary_code.is_sound(codes, num_inputs):
        raise MixtralError(
            f"{name}: codewords are damaged",
            expected=f"rows of {num_inputs} inputs",
            got="rows of others",
            fix="copy or quantize the checkpoint again",
            code=BAD_DATA,
        )


def join(scheme: str, parts: Mapping[str, Any], dtype: Any) -> QTensor:
    """A QTensor of its parts by name, arrays or what stands for them."""
    if "scale_codes" in parts:
        scales: Any = Nested(parts["scale_codes"], parts["scale_absmax"], parts["scale_offset"])
    else:
        scales = parts["scales"]
    order = parts.get("order")
    return QTensor(parts["codes"], scales, scheme, dtype, zeros=parts.get("zeros"), order=order)


def take_apart(q: QTensor) -> dict[str, Any]:
    """The parts of a QTensor by name: the inverse of ``join``."""
    found = {"codes": q.codes, "scales": q.scales, "zeros": q.zeros, "order": q.order}
    if isinstance(q.scales, Nested):
        del found["scales"]
        nested = (q.scales.codes, q.scales.absmax, q.scales.offset)
        found |= dict(zip(("scale_codes", "scale_absmax", "scale_offset"), nested, strict=True))
    return {name: part for name, part in found.items() if part is not None}


def quantized_weights(specs: Mapping[str, LeafSpec], dtype: Any) -> dict[str, QTensor]:
    """The quantized weights of a folder by path, with shapes in place of arrays.

    Args:
        specs: of what is stored.
        dtype: of the weights that they stand for.
    """
    found: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    schemes: dict[str, str] = {}
    for path, spec in specs.items():
        part = split_path(path)
        if part is not None:
            shape = spec.shape[:-1] if part.part == "scale_offset" else spec.shape
            parts = found.setdefault(part.weight, {})
            parts[part.part] = jax.ShapeDtypeStruct(shape, spec.dtype)
            schemes[part.weight] = part.scheme
    return {weight: join(schemes[weight], parts, dtype) for weight, parts in found.items()}
