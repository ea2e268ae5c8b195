"""Quantized weights made ready for a mesh that splits their matrices.

Where a mesh axis splits a matrix, its nested scales are computed (their blocks straddle rows), and
an order of the hidden channels is taken out of ``down`` by ordering the rows of gate and up alike:
which hidden channel is which is nobody's business. Everything else is split as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.qtensor import SCHEMES, Nested, QTensor
from mixtral_jax.sharding.rules import kind_specs
from mixtral_jax.weights import Adapted, ExpertSlots

_HIDDEN = (".gate", ".up", ".down")


def ways(sharding: NamedSharding, entry: Any) -> int:
    """Into how many parts an entry of the sharding's spec splits a dim."""
    names = (entry,) if isinstance(entry, str) else (entry or ())
    return math.prod(sharding.mesh.shape[name] for name in names)


def check_split(path: str, w: Any, sharding: NamedSharding) -> None:
    """Refuses a QTensor whose groups or bytes would be cut in two.

    Raises:
        MixtralError: exit code 78 saying what to change.
    """
    if isinstance(w, ExpertSlots):
        w = w.slots[0]
    if isinstance(w, Adapted):
        w = w.base
    if not isinstance(w, QTensor):
        return
    check_groups(path, w, ways(sharding, sharding.spec[-1]))


def check_groups(path: str, w: QTensor, parts: int) -> None:
    """``check_split`` for rows in so many parts."""
    if SCHEMES[w.scheme].is_coded and parts > 1:
        raise MixtralError(
            f"{path}: {w.scheme} codes whole rows, of {w.shape[-1]} inputs",
            expected="a mesh that splits none",
            got=f"{parts} parts of each",
            fix="choose a mesh without a tensor axis, and no more expert shards than experts",
            code=BAD_CONFIG,
        )
    groups, inputs = w.scales.shape[-1], w.shape[-1]
    unit = SCHEMES[w.scheme].unit[0] if SCHEMES[w.scheme].is_packed else 1
    if inputs % (parts * unit) or (groups > 1 and groups % parts):
        raise MixtralError(
            f"{path}: {w.scheme} rows of {inputs} inputs in {groups} groups",
            expected=f"whole groups in each of {parts} parts",
            got=f"{groups} / {parts} groups of {inputs // groups}",
            fix="choose a mesh with a smaller tensor axis, a smaller group size, or int8",
            code=BAD_CONFIG,
        )


def make_ready(
    weights: Mapping[str, Any], shardings: Mapping[str, NamedSharding]
) -> dict[str, Any]:
    """Un-nests scales and takes orders out where the mesh splits a matrix, on the devices.

    Args:
        weights: of any kind, by path, on their mesh as ``kind_specs`` says; experts stacked or in
            slots. ``check_split`` accepted them.
        shardings: of the weights, by path.

    Returns:
        The weights, on their mesh.
    """
    found = dict(weights)
    for path, w in weights.items():
        if _is_split(shardings[path]):
            found[path] = _unnested(w, shardings[path])
    for path, w in found.items():
        sharding = shardings[path]
        is_stack = len(sharding.spec) == 3
        if path.endswith(".down") and is_stack and ways(sharding, sharding.spec[-1]) > 1:
            names = [path.removesuffix(".down") + name for name in _HIDDEN]
            if _order_of(w) is not None:
                found |= _without_order({name: found[name] for name in names}, shardings)
    return found


def _is_split(sharding: NamedSharding) -> bool:
    return any(ways(sharding, entry) > 1 for entry in sharding.spec[-2:])


def _order_of(w: Any) -> Any:
    if isinstance(w, ExpertSlots):
        return _order_of(w.slots[0])
    if isinstance(w, Adapted):
        return _order_of(w.base)
    return w.order if isinstance(w, QTensor) else None


def _unnested(w: Any, sharding: NamedSharding) -> Any:
    if isinstance(w, ExpertSlots):
        return ExpertSlots(tuple(_unnested(slot, sharding) for slot in w.slots))
    if isinstance(w, Adapted):
        return dataclasses.replace(w, base=_unnested(w.base, sharding))
    if not (isinstance(w, QTensor) and isinstance(w.scales, Nested)):
        return w
    plain = dataclasses.replace(w, scales=jax.ShapeDtypeStruct(w.scales.shape, jnp.float32))
    specs = kind_specs(plain, sharding.spec)
    values = _compiled(_scale_values, NamedSharding(sharding.mesh, specs.scales))(w.scales)
    return dataclasses.replace(w, scales=values)


def _scale_values(scales: Nested) -> jax.Array:
    return scales.values()


@functools.lru_cache(maxsize=64)
def _compiled(function: Any, shardings: Any) -> Any:
    return jax.jit(function, out_shardings=shardings)


def _without_order(
    experts: dict[str, Any], shardings: Mapping[str, NamedSharding]
) -> dict[str, Any]:
    """The experts of a layer with the order of ``down`` moved into the rows of gate and up."""
    gate, up, down = experts.values()
    names = list(experts)
    if isinstance(down, ExpertSlots):
        slots = [
            _reordered(three, names, shardings)
            for three in zip(gate.slots, up.slots, down.slots, strict=True)
        ]
        made = [ExpertSlots(tuple(column)) for column in zip(*slots, strict=True)]
    else:
        made = _reordered((gate, up, down), names, shardings)
    return dict(zip(names, made, strict=True))


def _reordered(
    experts: tuple[Any, Any, Any], names: list[str], shardings: Mapping[str, NamedSharding]
) -> list[Any]:
    """Gate, up and down; factors of an adapter are reordered with what they are added to."""
    *others, down = experts
    order, unordered = _order_of(down), _drop_order(down)
    made = [
        _compiled(take_rows, _placed(w, shardings[name]))(w, order)
        for w, name in zip(others, names[:2], strict=True)
    ]
    if not isinstance(unordered, Adapted):
        return [*made, unordered]
    a = _compiled(_take_columns, _placed(unordered, shardings[names[2]]).a)(unordered.a, order)
    return [*made, dataclasses.replace(unordered, a=a)]


def _drop_order(down: Any) -> Any:
    if isinstance(down, Adapted):
        return dataclasses.replace(down, base=_drop_order(down.base))
    return dataclasses.replace(down, order=None)


def _placed(w: Any, sharding: NamedSharding) -> Any:
    """The sharding of each part of a weight."""
    specs = kind_specs(w, sharding.spec)
    return jax.tree.map(lambda _, spec: NamedSharding(sharding.mesh, spec), w, specs)


def take_rows(w: Any, order: jax.Array) -> Any:
    """Row j of each result is row ``order[..., j]`` of the matrix; ``[..., O, I]`` as it was."""

    def take(part: jax.Array) -> jax.Array:
        return jnp.take_along_axis(part, order[..., None], axis=-2)

    if isinstance(w, Adapted):
        return dataclasses.replace(w, base=take_rows(w.base, order), b=take(w.b))
    if not isinstance(w, QTensor):
        return take(w)
    zeros = None if w.zeros is None else take(w.zeros)
    return dataclasses.replace(w, codes=take(w.codes), scales=take(w.scales), zeros=zeros)


def _take_columns(a: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.take_along_axis(a, order[..., None, :], axis=-1)
