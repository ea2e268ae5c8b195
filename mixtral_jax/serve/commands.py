"""What the engine asks of its device: small values that other processes can be told too.

Pure Python and numpy. A Device that executes the same commands in the same order comes to the same
state, wherever it runs; so rank 0 decides, and everybody executes.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any, TypeAlias

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restart:
    """Empty a scratch row for another prompt, which uses an adapter (0: none)."""

    row: int
    adapter: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restore:
    """Put a kept chunk into a scratch row, whose first ``start`` tokens are there."""

    row: int
    start: int
    block_id: int
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """Read a chunk of prompts into scratch rows; with ``targets`` also score them.

    ``tokens`` and ``targets`` are int32 ``[rows, size]``, ``counts`` int32 ``[rows]``;
    ``wants_best`` asks for the likeliest tokens at each place beside the scores.
    """

    tokens: np.ndarray
    counts: np.ndarray
    targets: np.ndarray | None = None
    wants_best: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """What a Read with targets found: f32 ``[rows, size]``, and the likeliest tokens.

    ``best_ids`` and ``best_logprobs`` ``[rows, size, n]`` are None where nobody wanted them.
    """

    logprobs: np.ndarray
    best_ids: np.ndarray | None = None
    best_logprobs: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Keep:
    """Keep the chunk at ``start`` of a scratch row under a number."""

    row: int
    start: int
    block_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forget:
    """Drop kept chunks."""

    block_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Insert:
    """Copy a prompt into its slot with its options (fields of ``Controls``)."""

    class_id: int
    from_row: int
    to_row: int
    token: int
    budget: int
    adapter: int
    controls: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """Write up to ``num_steps`` tokens to the rows of a pool that are ``running``.

    ``masks`` holds the packed mask (uint32) of each row under a grammar.
    """

    class_id: int
    num_steps: int
    running: tuple[int, ...]
    masks: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stop:
    """Nothing more comes."""


Command: TypeAlias = Restart | Restore | Read | Keep | Forget | Insert | Step | Stop

_KINDS = {
    kind.__name__: kind for kind in (Restart, Restore, Read, Keep, Forget, Insert, Step, Stop)
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepped:
    """What a Step wrote: numpy arrays over the rows of the pool.

    ``dropped`` and ``read_dropped`` ``[L]`` are what the pool, and reading prompts, left out so
    far; ``expert_counts`` is ``[B, L, E]``; ``best_ids`` and ``best_logprobs`` ``[B, steps, n]``
    are None where no row wants them.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    is_done: np.ndarray
    is_bad: np.ndarray
    dropped: np.ndarray
    read_dropped: np.ndarray
    expert_counts: np.ndarray
    best_ids: np.ndarray | None = None
    best_logprobs: np.ndarray | None = None


def to_json(command: Command) -> dict[str, Any]:
    """A command as a JSON object."""
    fields = {field.name: getattr(command, field.name) for field in dataclasses.fields(command)}
    return {"command": type(command).__name__} | {n: _plain(v) for n, v in fields.items()}


def from_json(message: dict[str, Any]) -> Command:
    """The command that ``to_json`` wrote.

    Raises:
        KeyError: if it names no command.
    """
    kind = _KINDS[message["command"]]
    return kind(**{n: _rich(v) for n, v in message.items() if n != "command"})


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"array": data, "dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, dict):
        return {"dict": [[_plain(k), _plain(v)] for k, v in value.items()]}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _rich(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_rich(item) for item in value)
    if isinstance(value, dict) and "dict" in value:
        return {_rich(k): _rich(v) for k, v in value["dict"]}
    if isinstance(value, dict):
        data = np.frombuffer(base64.b64decode(value["array"]), value["dtype"])
        return data.reshape(value["shape"])
    return value
