"""What our commands set before JAX starts, so that a user need not: see docs/log.md for each gain.

A library does not change its caller's environment: only commands call ``prepare``.
"""

from __future__ import annotations

import os
from pathlib import Path


def compile_cache_folder() -> Path:
    """Where compiled programs are kept between runs: ``$XDG_CACHE_HOME/mixtral-jax/xla``."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mixtral-jax" / "xla"


def prepare() -> None:
    """Keeps every compiled program on disk, for the next run of the same shapes.

    What the user set stays: JAX_COMPILATION_CACHE_DIR names another folder, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. Where no folder can be made there is none.
    """
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is not None:
        return
    folder = compile_cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home: nothing is lost but time
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The many small programs of a start add up: all are kept, not only those of a second or more.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
