"""The small files beside the weights: which travel, that they are safe to copy, their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.config import CONFIG_NAME as CONFIG
from mixtral_jax.config import (
    NATIVE_NAME,
    ModelConfig,
    config_path,
    config_to_dict,
    followed_window,
)
from mixtral_jax.convert.leaves import config_content
from mixtral_jax.convert.manifest import NAME as MANIFEST
from mixtral_jax.convert.manifest import file_sha256, write_durably
from mixtral_jax.convert.reader import INDEX_NAME, safe_path
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.tokenizer import find_tokenizer

# config.json is written anew, not copied. A tokenizer of another name travels too.
COMPANIONS = (
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v3",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)
MAX_COMPANION_BYTES = 64 << 20
# What looks like part of a model, so that leaving it behind is worth a line.
_NOTEWORTHY = ("*.json", "*.jinja", "*.model", "*.model.v*", "tokenizer*")


def find_companions(src: Path, note: Callable[[str], None]) -> tuple[str, ...]:
    """The names of the files to copy, with one note about those that are left behind.

    Raises:
        MixtralError: exit code 65 for a link that leaves the checkpoint, before any work.
    """
    for name in (CONFIG, NATIVE_NAME, INDEX_NAME, *COMPANIONS):
        safe_path(src, name)
    tokenizer = find_tokenizer(src)
    wanted: list[str] = list(COMPANIONS)
    if tokenizer is not None and tokenizer.name not in wanted:
        wanted.append(tokenizer.name)
    found = tuple(name for name in wanted if _fits(safe_path(src, name)))
    known = {CONFIG, config_path(src).name, INDEX_NAME, MANIFEST, *found}
    left = {path.name for pattern in _NOTEWORTHY for path in src.glob(pattern)} - known
    if left:
        note(f"not copied: {', '.join(repr(name) for name in sorted(left))}")
    return found


def _fits(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= MAX_COMPANION_BYTES


def digests_of(src: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The sha256 (hex) of each file that travels, and of the configuration, as they lie there."""
    paths = [config_path(src), *(safe_path(src, name) for name in names)]
    return {path.name: file_sha256(path) for path in paths}


def copy_companions(
    src: Path, dst: Path, names: tuple[str, ...], *, config: ModelConfig, dtype: str
) -> dict[str, str]:
    """Copies the files and writes config.json for weights of ``dtype``.

    Returns:
        The sha256 of each file by its name.
    """
    contents = {name: safe_path(src, name).read_bytes() for name in names}
    fields = config_content(src, config) | followed_window(config)
    return _write(dst, contents, fields, dtype)


def write_config(dst: Path, config: ModelConfig, *, dtype: str) -> dict[str, str]:
    """Writes config.json alone, for weights that have no folder they came from."""
    return _write(dst, {}, config_to_dict(config), dtype)


def _write(
    dst: Path, contents: dict[str, bytes], fields: dict[str, Any], dtype: str
) -> dict[str, str]:
    fields.pop("quantization_config", None)  # of the source's files: ours tell by their names
    for key in ("dtype", "torch_dtype"):
        if key in fields or key == "torch_dtype":
            fields[key] = dtype
    contents[CONFIG] = json.dumps(fields, indent=2).encode()
    for name, content in contents.items():
        write_durably(dst / name, content)
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def check_companions(folder: Path, digests: Mapping[str, str]) -> None:
    """Proves the small files of a converted folder.

    Raises:
        MixtralError: exit code 65 naming the file that is missing or was altered.
    """
    for name, digest in digests.items():
        path = safe_path(folder, name)
        content = path.read_bytes() if path.is_file() else None
        if content is None or hashlib.sha256(content).hexdigest() != digest:
            what = "is missing" if content is None else "was altered (its sha256 differs)"
            raise MixtralError(
                f"{path} {what}", fix="put the file back, or convert again", code=BAD_DATA
            )
