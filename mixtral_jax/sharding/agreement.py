"""What the processes of one command must agree on, as short facts that name what differs.

Processes that were started with other arguments run other programs: they give a wrong answer, or
wait for each other for ever. So each tells process 0 its facts at a barrier, before it is too late.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

Facts = dict[str, str]

FIX = "start every process with the same arguments, checkpoint and version"
_OWN = {"coordinator", "num_processes", "process_id", "debug"}  # options of one process
_LONGEST = 80
_KINDS = {".json", ".model", ".safetensors"}
_END_BYTES = 1 << 16  # read at both ends of a file
_MOST_NAMED = 5


def version_facts() -> Facts:
    """Versions of what computes."""
    try:
        ours = metadata.version("mixtral-jax")
    except metadata.PackageNotFoundError:  # run from a folder
        ours = "not installed"
    return {"the version of mixtral_jax": ours, "the version of jax": jax.__version__}


def option_facts(options: Any) -> Facts:
    """Every option of a command, named as on its command line, but those that are one process's.

    Args:
        options: a dataclass; fields that are dataclasses hold options too.
    """
    facts = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            facts |= option_facts(value)
        elif field.name not in _OWN:
            facts[field.name.replace("_", "-")] = short(value)
    return facts


def file_facts(folder: Path) -> Facts:
    """Which checkpoint lies in a folder: its files by size and a digest of both of their ends."""
    files = [p for p in sorted(folder.glob("*")) if p.suffix in _KINDS and p.is_file()]
    return {f"the file {path.name}": _ends(path) for path in files}


def _ends(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(_END_BYTES))
        file.seek(max(file.tell(), size - _END_BYTES))
        digest.update(file.read(_END_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:12]}"


def short(value: object) -> str:
    """Its repr; what is long is cut, and told apart by a digest."""
    text = repr(value)
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    return f"{text[: _LONGEST // 2]}... ({len(text)} characters, {digest[:12]})"


def difference(facts: Mapping[int, Mapping[str, str]]) -> str | None:
    """One line about the first process whose facts are not those of process 0, or None."""
    for rank in sorted(facts):
        parts = list(_parts(facts[rank], facts[0]))
        if parts:
            more = f" and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
            named = "; ".join(parts[:_MOST_NAMED])
            return f"process {rank} does not do what process 0 does: {named}{more}"
    return None


def _parts(theirs: Mapping[str, str], first: Mapping[str, str]) -> Iterator[str]:
    for name in dict.fromkeys([*first, *theirs]):
        got, wanted = theirs.get(name, "missing"), first.get(name, "missing")
        if got != wanted:
            yield f"{name} is {got}, in process 0 {wanted}"
