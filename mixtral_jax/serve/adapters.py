"""LoRA adapters that requests choose by name, several in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mixtral_jax.convert.adapter import Adapter
from mixtral_jax.convert.row_adapters import attach_each
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.model.transformer import assemble, leaf_specs, leaves_of
from mixtral_jax.sharding.place import weight_shardings
from mixtral_jax.sharding.placement import MeshPlacement


def with_adapters(
    lm: LanguageModel,
    adapters: Mapping[str, str | Path],
    *,
    note: Callable[[str], None] = lambda line: None,
) -> LanguageModel:
    """The model with adapters beside it: row id k is the k-th of ``adapters``, 0 is none.

    Args:
        lm: loaded without an adapter.
        adapters: PEFT folders by the name that requests use.
        note: called with one line where something is not as the adapter says.

    Raises:
        MixtralError: exit code 65 or 66 for an adapter that does not fit the model; 78 for one of
            more than attention.
    """
    if not adapters:
        return lm
    config, placement = lm.config, lm.placement
    opened = [Adapter(folder, config, base=lm.folder) for folder in adapters.values()]
    for adapter in opened:
        for line in adapter.notes:
            note(line)
    is_mesh = isinstance(placement, MeshPlacement)
    mesh = placement.mesh if is_mesh else lm.spec.build()
    strategy = placement.strategy if is_mesh else None
    shardings = weight_shardings(leaf_specs(config), mesh, *([strategy] if strategy else []))
    attached = attach_each(leaves_of(lm.model), opened, lambda path: shardings[path])
    return LanguageModel(
        assemble(config, attached),
        tokenizer=lm.tokenizer,
        placement=placement,
        spec=lm.spec,
        folder=lm.folder,
        kv_dtype=lm.kv_dtype,
        note=note,
    )
