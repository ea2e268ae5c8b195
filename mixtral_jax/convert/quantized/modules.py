"""Quantized matrices among the tensors of a checkpoint: their parts put together, and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from mixtral_jax.convert.quantized.form import Form, Method
from mixtral_jax.convert.safetensors_file import Tensor

WEIGHT = ".weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Module:
    """A quantized matrix: what lies in the files in place of one weight.

    Attributes:
        name: of the weight that it stands for (``...q_proj.weight``).
        parts: its tensors, by part.
    """

    name: str
    parts: Mapping[str, Tensor]


class Gathered(NamedTuple):
    """Every tensor of a checkpoint once: by itself, or as a part of a module."""

    plain: dict[str, Tensor]
    modules: dict[str, Module]


def gather(tensors: Mapping[str, Tensor], method: Method | None) -> Gathered:
    """Puts the parts of each quantized matrix together, by their names.

    A matrix is quantized if it has one part at least that plain weights lack, so that one with
    parts missing is told from a plain one.
    """
    if method is None:
        return Gathered(dict(tensors), {})
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for ending, part in method.endings.items():
            if name.endswith(ending):
                found.setdefault(name.removesuffix(ending), {})[part] = tensor
                break
    modules = {
        stem + WEIGHT: Module(name=stem + WEIGHT, parts=parts)
        for stem, parts in found.items()
        if not method.marks.isdisjoint(parts)
    }
    taken = {tensor.name for module in modules.values() for tensor in module.parts.values()}
    return Gathered({name: t for name, t in tensors.items() if name not in taken}, modules)


def common_form(forms: list[Form]) -> Form | None:
    """The one form of a stack of matrices; None if they differ in more than an order.

    Where only some are out of order, all have one.
    """
    first = dataclasses.replace(forms[0], has_order=any(form.has_order for form in forms))
    same = all(dataclasses.replace(f, has_order=first.has_order) == first for f in forms)
    return first if same else None
