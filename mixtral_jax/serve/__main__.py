"""``python -m mixtral_jax.serve``: a model behind the APIs of TGI and OpenAI."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from mixtral_jax import cli
from mixtral_jax.errors import BAD_CONFIG, OK, MixtralError
from mixtral_jax.serve.launcher import arguments
from mixtral_jax.serve.options import ServeOptions
from mixtral_jax.sharding import hosts
from mixtral_jax.terminal import note


def main(options: ServeOptions) -> int:
    """Loads, listens, serves until a signal."""
    try:
        import fastapi  # noqa: F401  (an extra; the message below says which)
    except ImportError as error:
        raise MixtralError(
            f"serving needs {error.name}", fix='pip install "mixtral-jax[serve]"', code=BAD_CONFIG
        ) from None
    from mixtral_jax.serve import logs
    from mixtral_jax.serve.app import create_app
    from mixtral_jax.serve.auth import read_keys
    from mixtral_jax.serve.server import bind, serve

    logs.configure(as_json=options.watch.json_output)
    keys = read_keys(options.http, os.environ)
    # Before the model is loaded: a taken port is told at once. Process 0 serves, others follow it.
    hosts.join(options.processes, options)
    listening = bind(options.http) if hosts.is_first() else None
    # By its name: what only speaks HTTP needs no jax.
    start = importlib.import_module("mixtral_jax.serve.start").start
    engine = start(options.source, options)
    if listening is None:
        return OK  # it followed until process 0 ended
    app = create_app(engine, engine.tokenizer, options, keys=keys)
    code = serve(app, options, listening)
    if not engine.has_ended:  # the interpreter would wait for its device
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run(argv: Sequence[str]) -> int:
    """Reads the command line as TGI's launcher would, and runs."""
    try:
        words, notes = arguments(argv, os.environ)
    except MixtralError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    for line in notes:
        note(line)
    return cli.run_verb("serve", main, ServeOptions, words)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
