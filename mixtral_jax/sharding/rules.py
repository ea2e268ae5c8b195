"""The table from logical axes to mesh axes. Total: an axis that it does not name is an error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh, PartitionSpec

from mixtral_jax.qtensor import Nested
from mixtral_jax.weights import Adapted, ExpertSlots, QTensor, RowAdapted

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]

WEIGHT_RULES: Rules = {
    "vocab": "tensor",
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "expert": "expert",
    "router_expert": None,
    "mlp": "tensor",
    "norm": None,
}

# `batch` depends on the number of rows: see batch_axes.
ACTIVATION_RULES: Rules = {
    "length": None,
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "channels": None,
    "slots": None,
    "layers": None,
    "vocab": None,
    "vocab_parts": "tensor",
    "router_expert": None,
}

# A product of one row takes another path than two (and on CPU differs in the last bit), so no
# device is left with fewer.
MIN_ROWS_PER_DEVICE = 2


def batch_axes(
    rows: int, mesh: Mesh, *, may_spread: bool = True, min_rows: int = MIN_ROWS_PER_DEVICE
) -> tuple[str, ...]:
    """Mesh axes that the rows of a batch lie on.

    Rows spread over data x expert where every device gets at least ``min_rows``, else
    over data alone (then the devices of the expert axis repeat the attention of their data shard,
    or, where ``may_spread`` is false, share its heads).

    Raises:
        ValueError: if the rows do not divide by the data axis.
    """
    data, both = mesh.shape["data"], mesh.shape["data"] * mesh.shape["expert"]
    if rows % data:
        raise ValueError(f"batch: expected a multiple of the data axis ({data}), got {rows} rows")
    spread = may_spread and rows % both == 0 and rows // both >= min_rows
    return ("data", "expert") if spread else ("data",)


def partition_spec(axes: tuple[str, ...], rules: Rules) -> PartitionSpec:
    """The PartitionSpec of an array whose dims have these logical names.

    Raises:
        ValueError: for a name the rules do not know, or two dims on one mesh axis.
    """
    entries: list[MeshAxes] = []
    taken: dict[str, str] = {}
    for name in axes:
        if name not in rules:
            raise ValueError(
                f"logical axis {name!r}: expected one of {sorted(rules)}; add it to the rules"
            )
        entry = rules[name]
        for mesh_axis in (entry,) if isinstance(entry, str) else (entry or ()):
            if mesh_axis in taken:
                raise ValueError(
                    f"logical axes {taken[mesh_axis]!r} and {name!r} of one array both map to mesh "
                    f"axis {mesh_axis!r}; map one of them elsewhere"
                )
            taken[mesh_axis] = name
        entries.append(entry)
    return PartitionSpec(*entries)


def kind_specs(w: Any, spec: PartitionSpec) -> Any:
    """A tree of specs like the weight kind ``w``, whose dims ``[..., O, I]`` lie as in ``spec``."""
    if isinstance(w, ExpertSlots):
        return ExpertSlots(tuple(kind_specs(slot, spec) for slot in w.slots))
    if isinstance(w, QTensor):
        return _quantized_specs(w, spec)
    if isinstance(w, Adapted):
        *stack, out, summed = spec
        return dataclasses.replace(
            w,
            base=kind_specs(w.base, spec),
            a=PartitionSpec(*stack, None, summed),
            b=PartitionSpec(*stack, out, None),
        )
    if isinstance(w, RowAdapted):
        out, summed = spec
        return dataclasses.replace(
            w,
            base=kind_specs(w.base, spec),
            a=PartitionSpec(None, None, summed),
            b=PartitionSpec(None, out, None),
            scales=PartitionSpec(None),
            ids=None,
        )
    return spec


def _quantized_specs(w: QTensor, spec: PartitionSpec) -> QTensor:
    """Scales and zero points lie with their codes; nested scales and an order are not split."""
    *stack, out, summed = spec
    one_group = w.scales.shape[-1] == 1  # every part of a row shares its only scale
    groups = PartitionSpec(*stack, out, None if one_group else summed)
    whole = PartitionSpec(*stack, None)
    scales: Any = groups
    if isinstance(w.scales, Nested):
        scales = Nested(PartitionSpec(*stack, None, None), whole, PartitionSpec(*stack))
    return dataclasses.replace(
        w,
        codes=spec,
        scales=scales,
        zeros=None if w.zeros is None else groups,
        order=None if w.order is None else whole,
    )
