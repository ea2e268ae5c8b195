"""The Mixtral mixture-of-experts family in JAX/Flax, expert-parallel on a device mesh.

Table of contents:

==================== ===========================================================================
``load``             opens a checkpoint folder, or ``"tiny"``, on a mesh
``LanguageModel``    what ``load`` gives: logits, generate, chat, stream
``Completion``       one generated row
``SamplingOptions``  temperature, top_k, top_p, ...
``ModelConfig``      what a Mixtral is; read from config.json
``PRESETS``          the published configurations by name
``MeshSpec``         a mesh, such as ``1x8`` or ``data=2,expert=4``
``MixtralError``     every fault that a person can mend, with its exit code
==================== ===========================================================================

The commands: ``mixtral-jax sample``, ``mixtral-jax convert``, ... (``commands.py`` lists them).

Names load on first use, so importing this package imports neither JAX nor Flax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixtral_jax.config import PRESETS, ModelConfig
    from mixtral_jax.decode.sampling import SamplingOptions
    from mixtral_jax.errors import MixtralError
    from mixtral_jax.language_model import Completion, LanguageModel, load
    from mixtral_jax.sharding.cluster import ProcessOptions
    from mixtral_jax.sharding.hosts import join
    from mixtral_jax.sharding.mesh import MeshSpec

    __version__: str

__all__ = [
    "PRESETS",
    "Completion",
    "LanguageModel",
    "MeshSpec",
    "MixtralError",
    "ModelConfig",
    "ProcessOptions",
    "SamplingOptions",
    "__version__",
    "join",
    "load",
]

# `convert` is missing on purpose: that name is the package `mixtral_jax.convert`.
_HOMES = {
    "PRESETS": "config",
    "Completion": "language_model",
    "LanguageModel": "language_model",
    "MeshSpec": "sharding.mesh",
    "MixtralError": "errors",
    "ModelConfig": "config",
    "ProcessOptions": "sharding.cluster",
    "SamplingOptions": "decode.sampling",
    "join": "sharding.hosts",
    "load": "language_model",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on its first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("mixtral-jax")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(f"mixtral_jax.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'mixtral_jax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
