"""From a checkpoint and options to an engine: what a command does before it listens."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from mixtral_jax.convert.manifest import read_ours
from mixtral_jax.convert.quantized.methods import read_method
from mixtral_jax.errors import BAD_CONFIG, MixtralError
from mixtral_jax.language_model import LanguageModel, load
from mixtral_jax.serve.adapters import with_adapters
from mixtral_jax.serve.engine import Engine
from mixtral_jax.serve.follow import follow
from mixtral_jax.serve.limits import EngineOptions, plan_limits
from mixtral_jax.sharding import hosts


@runtime_checkable
class Asked(Protocol):
    """What is asked of the engine's side; the options of the command are one."""

    @property
    def adapters(self) -> Mapping[str, str]:
        """Folder of each LoRA adapter by the name that requests use."""
        ...

    @property
    def checkpoint_method(self) -> str | None:
        """How the checkpoint itself has to be quantized, or None where that was not asked."""
        ...

    def load_fields(self) -> dict[str, Any]:
        """Keyword arguments for LoadOptions."""
        ...

    def engine_fields(self) -> dict[str, Any]:
        """Keyword arguments for EngineOptions."""
        ...


def start(source: str, asked: Asked) -> Engine | None:
    """Loads a model and starts its engine, which is ``loading`` until its programs are made.

    In every process but the first: executes what process 0 says, and returns when that ends.

    Args:
        source: ``tiny``, a folder, or ``org/name[@revision]``.
        asked: options.

    Returns:
        The engine; None in other processes than the first.

    Raises:
        MixtralError: as ``load`` and ``with_adapters`` raise it; 64 for limits that do not fit,
            78 for a checkpoint that is not quantized as asked.
    """
    options = EngineOptions(**asked.engine_fields())
    fields = asked.load_fields()
    lm = load(source, note=_note, **fields)
    _check_method(lm, asked.checkpoint_method)
    lm = with_adapters(lm, asked.adapters, note=_note)
    names = tuple(asked.adapters)
    if not hosts.is_first():
        follow(lm, plan_limits(lm, options, len(names))[1])
        return None
    engine = Engine(
        lm,
        options,
        name=source,
        digest=_digest(lm),
        quantize=asked.checkpoint_method or fields.get("quantize"),
        adapters=names,
    )
    engine.start()
    return engine


def _check_method(lm: LanguageModel, wanted: str | None) -> None:
    # A folder of ours keeps the leaves as they were made, and no word of the method.
    if wanted is None or lm.folder is None or read_ours(lm.folder) is not None:
        return
    method = read_method(lm.folder, lambda line: None)
    got = "one that is not quantized" if method is None else method.name
    # compressed-tensors is a container of several methods.
    is_as_asked = method is not None and wanted in (got.lower(), "compressed-tensors")
    if not is_as_asked:
        raise MixtralError(
            f"--quantize {wanted}",
            expected=f"a checkpoint that is quantized with {wanted}",
            got=got,
            fix="serve such a checkpoint, or quantize while loading: --quantize int8, int4 or nf4",
            code=BAD_CONFIG,
        )


def _digest(lm: LanguageModel) -> str | None:
    """Of a folder that convert wrote."""
    ours = None if lm.folder is None else read_ours(lm.folder)
    return None if ours is None else ours.digest


def _note(line: str) -> None:
    if hosts.is_first():
        print(f"note: {line}", file=sys.stderr, flush=True)
