"""Published checkpoints in and out: names, bytes, digests.

The names below load when first used, so that importing a part costs only that part.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_jax.convert.driver import convert
    from mixtral_jax.convert.leaves import is_checkpoint
    from mixtral_jax.convert.load import load_weights
    from mixtral_jax.convert.options import ConvertOptions, ConvertReport
    from mixtral_jax.convert.save import save_model

__all__ = [
    "ConvertOptions",
    "ConvertReport",
    "convert",
    "is_checkpoint",
    "load_weights",
    "save_model",
]

_HOMES = {
    "ConvertOptions": "options",
    "ConvertReport": "options",
    "convert": "driver",
    "is_checkpoint": "leaves",
    "load_weights": "load",
    "save_model": "save",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
