"""Which base an adapter was trained on: carried in its safetensors metadata, compared at load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.convert.manifest import read_ours
from mixtral_jax.convert.reader import Checkpoint
from mixtral_jax.errors import BAD_DATA, MixtralError

DIGEST = "mixtral_jax.base_digest"  # of the weights, where a folder of ours knows it
FILES = "mixtral_jax.base_files"  # of the published files, by size, header and a sample


def _of_files(fingerprint: Any) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def identity_of(folder: Path | None) -> dict[str, str]:
    """What is known of a base: the digest of its weights, and of the files they came from."""
    if folder is None:
        return {}
    ours = read_ours(folder)
    if ours is None:
        with Checkpoint(folder) as checkpoint:
            return {FILES: _of_files(checkpoint.fingerprint)}
    found = {DIGEST: ours.digest}
    if "files" in ours.fingerprint:
        found[FILES] = _of_files(ours.fingerprint["files"])
    return found


def check_base(adapter: str, carried: Mapping[str, str], folder: Path) -> None:
    """Refuses an adapter that carries another base's identity; one that carries none passes.

    Args:
        adapter: its folder, for the message.
        carried: metadata of its tensors.
        folder: of the base.

    Raises:
        MixtralError: exit code 65.
    """
    here = identity_of(folder)
    both = [key for key in (DIGEST, FILES) if key in carried and key in here]
    if both and all(carried[key] != here[key] for key in both):
        raise MixtralError(
            f"adapter {adapter}",
            expected=f"one that was trained on {folder}",
            got=f"one of the base {carried[both[0]][:12]} (this one: {here[both[0]][:12]})",
            fix="load the base that the adapter was trained on",
            code=BAD_DATA,
        )
