"""lm-eval with models of this package: ``python -m mixtral_jax.evaluate lm-eval ...``.

lm-eval 0.4.13 has a registry of model classes by name and reads no entry points of other packages,
so a class of ours must be registered in the process that runs it. ``register`` does that, and
the command registers it and then runs lm-eval's own command line. lm-eval is no dependency: it is
imported where it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from mixtral_jax.errors import OK, USAGE, MixtralError

NAME = "mixtral_jax"
_OTHER_COMMANDS = ("ls", "validate")  # of lm-eval, which load no model


def register() -> None:
    """Makes ``model="mixtral_jax"`` known to lm-eval in this process; more than once is fine.

    Raises:
        MixtralError: exit code 64 without lm-eval.
    """
    if importlib.util.find_spec("lm_eval") is None:
        fix = "pip install 'lm-eval[api]>=0.4.13'"
        raise MixtralError("lm-eval is not installed", fix=fix, code=USAGE)
    importlib.import_module("lm_eval.models")  # registers its own first
    registry = importlib.import_module("lm_eval.api.registry").model_registry
    if NAME not in registry:
        registry.register(NAME, target="mixtral_jax.evaluate.harness_model:HarnessModel")


def run(arguments: Sequence[str]) -> int:
    """Runs lm-eval's command line, with ``--model mixtral_jax`` unless a model is named.

    Args:
        arguments: of lm-eval.

    Raises:
        MixtralError: exit code 64 without lm-eval, and what loading and scoring raise.
    """
    register()
    words = [word.split("=")[0] for word in arguments]
    is_run = bool(arguments) and words[0] not in _OTHER_COMMANDS
    has_model = "--model" in words or "-M" in words or "--config" in words or "-C" in words
    chosen = ["--model", NAME] if is_run and not has_model else []
    command = importlib.import_module("lm_eval.__main__").cli_evaluate
    before = sys.argv
    sys.argv = ["lm-eval", *arguments, *chosen]
    try:
        command()
    except SystemExit as stop:
        if stop.code not in (None, 0):
            # Its own message stands on stderr already, over several lines.
            what, fix = "lm-eval stopped", "python -m mixtral_jax.evaluate lm-eval run --help"
            raise MixtralError(what, fix=fix, code=USAGE) from None
    finally:
        sys.argv = before
    return OK
