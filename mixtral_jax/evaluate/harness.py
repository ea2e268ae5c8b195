"""lm-eval with models of this package: ``python -m mixtral_jax.evaluate lm-eval ...``.

lm-eval 0.4.13 has a registry of model classes by name and reads no entry points of other packages,
so a class of ours must be registered in the process that runs it. ``register`` does that, and
the command registers it and then runs lm-eval's own command line. lm-eval is no dependency: it is
imported where it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, OK, USAGE, MixtralError

NAME = "mixtral_jax"
_OTHER_COMMANDS = ("ls", "validate")  # of lm-eval, which load no model
_HELP = "python -m mixtral_jax.evaluate lm-eval run --help"


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
        MixtralError: exit code 64 without lm-eval or for what it refuses, and what loading and
            scoring raise.
    """
    register()
    command = importlib.import_module("lm_eval.__main__").cli_evaluate
    before = sys.argv
    sys.argv = ["lm-eval", *_with_model(arguments)]
    try:
        command()
    except SystemExit as stop:
        if stop.code not in (None, 0):
            # Its own message stands on stderr already, over several lines.
            raise MixtralError("lm-eval stopped", fix=_HELP, code=USAGE) from None
    except ValueError as error:
        if isinstance(error, MixtralError) or not _is_from_lm_eval(error):
            raise
        what = f"lm-eval: {' '.join(str(error).split())}"
        fix = "python -m mixtral_jax.evaluate lm-eval ls tasks" if "Tasks not" in what else _HELP
        raise MixtralError(what, fix=fix, code=USAGE) from None
    finally:
        sys.argv = before
    return OK


def _with_model(arguments: Sequence[str]) -> list[str]:
    """Arguments with our model first, so that another one named behind it wins, as lm-eval reads.

    A model in the file of ``--config`` would lose against any on the command line, and wins here.
    """
    words = list(arguments)
    if not words or words[0] in _OTHER_COMMANDS:
        return words
    command, rest = (["run"], words[1:]) if words[0] == "run" else ([], words)
    # No abbreviation of --config is unambiguous among lm-eval's options.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", "-C")
    try:
        config = parser.parse_known_args(rest)[0].config
    except argparse.ArgumentError:  # lm-eval says it better
        config = None
    if not rest or (config is not None and _names_model(config)):
        return words
    return [*command, "--model", NAME, *rest]


def _names_model(config: str) -> bool:
    """Whether a YAML file of lm-eval's options has a model."""
    if not Path(config).is_file():
        fix = "name a YAML file of lm-eval's options"
        raise MixtralError(f"--config: no file {config}", fix=fix, code=INPUT_NOT_FOUND)
    read = importlib.import_module("lm_eval.config.evaluate_config").EvaluatorConfig
    try:
        return bool(read.load_yaml_config(config).get("model"))
    except (ValueError, TypeError) as error:
        what = f"--config: {' '.join(str(error).split())}"
        raise MixtralError(what, fix="mend the file", code=BAD_DATA) from None


def _is_from_lm_eval(error: BaseException) -> bool:
    """Whether it was raised in lm-eval's own code."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
    return name.split(".")[0] == "lm_eval"
