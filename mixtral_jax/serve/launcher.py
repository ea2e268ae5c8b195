"""The command line as TGI's launcher takes it: its environment, and its flags without a use here.

What has no effect is accepted and said, so that a deployment moves over without being edited; what
would be unsafe is refused.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.serve.options import (
    BatchFlags,
    HttpFlags,
    ModelFlags,
    RequestFlags,
    WatchFlags,
)

# Flag -> whether a value follows. These tune parts of TGI that this server does not have.
WITHOUT_EFFECT = {
    "--sharded": True,
    "--speculate": True,
    "--cuda-graphs": True,
    "--cuda-memory-fraction": True,
    "--disable-custom-kernels": False,
    "--enable-prefill-logprobs": False,
    "--huggingface-hub-cache": True,
    "--master-addr": True,
    "--master-port": True,
    "--shard-uds-path": True,
    "--trust-remote-code": False,
    "--usage-stats": True,
    "--watermark-delta": True,
    "--watermark-gamma": True,
    "--validation-workers": True,
    "--weights-cache-override": True,
}
# These would change what is computed, or open the server to others.
REFUSED = {
    "--rope-scaling": "the checkpoint's config.json says how positions are turned",
    "--rope-factor": "the checkpoint's config.json says how positions are turned",
    "--tokenizer-config-path": "conversations are encoded natively",
    "--ngrok": "a tunnel is not this server's to open",
}
_ALIASES = {"--hostname": "--host", "-p": "--port", "--max-input-length": "--max-input-tokens"}
# HOSTNAME is not read: containers set it to their own name. API_KEY is read by auth.py.
_NOT_FROM_ENVIRONMENT = {"host", "insecure"}
_OLD_NAMES = {"max_input_tokens": "MAX_INPUT_LENGTH"}
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


class Arguments(NamedTuple):
    """What tyro is to parse, and what to tell the user."""

    argv: list[str]
    notes: list[str]


def arguments(argv: Sequence[str], environ: Mapping[str, str]) -> Arguments:
    """The command line with TGI's spellings put into ours, after what the environment says.

    Args:
        argv: arguments, without the program's name.
        environ: environment variables; those of TGI's launcher count unless argv has the option.

    Raises:
        MixtralError: exit code 64 for ``--api-key``, or a boolean variable that is none.
    """
    notes: list[str] = []
    kept: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag == "--api-key":
            raise MixtralError(
                "--api-key shows the key to every user of this machine",
                fix="put it into the environment (API_KEY) or a file (--api-key-file)",
                code=USAGE,
            )
        if flag in REFUSED:
            _refuse(flag)
        if flag in WITHOUT_EFFECT:
            notes.append(f"{flag} has no effect here")
            if WITHOUT_EFFECT[flag] and not equals and rest and not rest[0].startswith("--"):
                rest.pop(0)
            continue
        kept += [_ALIASES.get(flag, flag) + equals + value if flag.startswith("-") else word]
    for flag in (*REFUSED, *WITHOUT_EFFECT):
        value = environ.get(_variable(flag), "").lower()
        if value not in _FALSE and flag in REFUSED:
            _refuse(_variable(flag))
        elif value not in _FALSE:
            notes.append(f"environment variable {_variable(flag)} has no effect here")
    given = {word.partition("=")[0] for word in kept if word.startswith("--")}
    names_checkpoint = _names_checkpoint(kept)
    first: list[str] = []
    for name, kind in _fields().items():
        text = environ.get(name.upper(), environ.get(_OLD_NAMES.get(name, "")))
        flag = "--" + name.replace("_", "-")
        if text is None or not {flag, f"--no-{flag[2:]}"}.isdisjoint(given):
            continue
        if name == "model_id" and names_checkpoint:
            continue
        if {name, *given} >= {"num_shard", "--mesh"}:
            continue
        first += _from_environment(name, flag, kind, text)
    return Arguments(first + kept, notes)


def _variable(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_").upper()


def _refuse(name: str) -> NoReturn:
    flag = "--" + name.removeprefix("--").replace("_", "-").lower()
    raise MixtralError(f"{name} is not offered: {REFUSED[flag]}", fix="drop it", code=USAGE)


def _names_checkpoint(words: Sequence[str]) -> bool:
    """Whether one of the words is no option and no option's value."""
    booleans = {name for name, kind in _fields().items() if kind is bool} | {"debug", "insecure"}
    alone = {"-h", "--help"}
    for name in booleans:
        flag = name.replace("_", "-")
        alone |= {f"--{flag}", f"--no-{flag}"}
    is_value = False
    for word in words:
        if not word.startswith("-") and not is_value:
            return True
        is_value = word.startswith("-") and "=" not in word and word not in alone
    return False


def _from_environment(name: str, flag: str, kind: Any, text: str) -> list[str]:
    if kind is not bool:
        values = text.split(",") if name == "cors_allow_origin" else [text]
        return [word for value in values for word in (flag, value)] if text else []
    if text.lower() not in _TRUE + _FALSE:
        raise MixtralError(
            f"environment variable {name.upper()}",
            expected="true or false",
            got=repr(text),
            fix="set it to one of them",
            code=USAGE,
        )
    return [flag] if text.lower() in _TRUE else []


def _fields() -> dict[str, Any]:
    """Option name -> type, of all groups."""
    found = {}
    for group in (ModelFlags, BatchFlags, RequestFlags, HttpFlags, WatchFlags):
        kinds = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            if field.name not in _NOT_FROM_ENVIRONMENT:
                found[field.name] = kinds[field.name]
    return found
