"""Which base an adapter was trained on: carried in its safetensors metadata, compared at load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_jax.convert.manifest import NAME, read_ours
from mixtral_jax.convert.reader import Checkpoint
from mixtral_jax.errors import BAD_DATA, MixtralError

DIGEST = "mixtral_jax.base_digest"  # of the weights, where a folder of ours knows it
FILES = "mixtral_jax.base_files"  # of the published files, by size, header and a sample

# Of each there may be several, with spaces between them: a quantized folder has its own, and those
# of what it was made from, whose adapters it takes.


def _of_files(fingerprint: Any) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def identity_of(folder: Path | None) -> dict[str, str]:
    """What is known of a base: digests of its weights, and of the files they came from."""
    if folder is None:
        return {}
    ours = read_ours(folder)
    if ours is None:
        with Checkpoint(folder) as checkpoint:
            return {FILES: _of_files(checkpoint.fingerprint)}
    found: dict[str, list[str]] = {DIGEST: [ours.digest], FILES: []}
    # What an adapter was merged into is another base.
    made_from = None if "adapter" in ours.fingerprint else ours.fingerprint.get("files")
    while isinstance(made_from, dict):
        converted = made_from.get(NAME)
        if isinstance(converted, dict):
            found[DIGEST].append(str(converted.get("digest")))
        else:
            found[FILES].append(_of_files(made_from))
        made_from = made_from.get("source")  # of what was quantized
    return {key: " ".join(digests) for key, digests in found.items() if digests}


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
    if both and all(set(carried[key].split()).isdisjoint(here[key].split()) for key in both):
        raise MixtralError(
            f"adapter {adapter}",
            expected=f"one that was trained on {folder}",
            got=f"one of the base {carried[both[0]][:12]} (this one: {here[both[0]][:12]})",
            fix="load the base that the adapter was trained on",
            code=BAD_DATA,
        )
