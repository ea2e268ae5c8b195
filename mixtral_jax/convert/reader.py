"""The tensors of a published folder: which files they lie in, and safe ways to them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mixtral_jax.convert.safetensors_file import (
    MAX_HEADER_BYTES,
    SafetensorsFile,
    Tensor,
    bad_file,
    bytes_of,
)
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.json_file import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Native Mistral: one file, or several of disjoint tensors without an index.
NATIVE_FILE = re.compile(r"consolidated(\.\d{2,3})?\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


class Checkpoint:
    """The tensors of a published folder: one file, or several.

    Hugging Face: ``model.safetensors``, or shards named by an index. Native Mistral:
    ``consolidated.safetensors``, or numbered files of disjoint tensors. Where a folder has both,
    the files of Hugging Face are read, as its config.json describes them.

    Shards must be plain names inside the folder. A link is followed only as the Hugging Face
    cache makes them: to a regular file in the snapshot's own ``../../blobs``, or in the folder.

    Args:
        folder: where the files are.
        file: the one file to read, where it is not the model's own.

    Attributes:
        tensors: every tensor by name.
        unread: names of other safetensors files of the folder.
        problems: what is wrong with the accounting of tensors to files, for one joint error.
        fingerprint: file name -> its content, by size, header and a sample.
        whereabouts: file name -> which file it is, by its path (hashed) and time.

    Raises:
        MixtralError: exit code 66 without weights, 65 for unsound files.
    """

    def __init__(self, folder: str | Path, *, file: str | None = None):
        self.folder = Path(folder)
        self.problems: list[str] = []
        self._files: dict[str, SafetensorsFile] = {}
        weight_map = None if file else _read_index(self.folder)
        if weight_map is not None:
            names = set(weight_map.values())
        else:
            names = {file} if file else _weight_files(self.folder)
        others = () if file else self.folder.glob("*.safetensors")
        self.unread = tuple(sorted({path.name for path in others} - names))
        try:
            for name in sorted(names):
                self._files[name] = SafetensorsFile(safe_path(self.folder, name))
            self.tensors = self._account(weight_map)
        except BaseException:
            self.close()
            raise

    @property
    def metadata(self) -> dict[str, Any]:
        """What the files say of themselves, beside their tensors."""
        return {k: v for file in self._files.values() for k, v in file.metadata.items()}

    @property
    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Identifies the source by little of its data."""
        return {
            name: {
                "bytes": file.size,
                "header_sha256": file.header_digest,
                "sample_sha256": file.sample_digest(),
            }
            for name, file in self._files.items()
        }

    @property
    def whereabouts(self) -> dict[str, dict[str, Any]]:
        """Tells a file from another of the same fingerprint; true on this machine only."""
        return {
            name: {
                "path_sha256": hashlib.sha256(os.fsencode(file.path.resolve())).hexdigest(),
                "mtime_ns": file.mtime_ns,
            }
            for name, file in self._files.items()
        }

    def _account(self, weight_map: Mapping[str, str] | None) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file_name, file in self._files.items():
            for name, tensor in file.tensors.items():
                if weight_map is not None and weight_map.get(name) != file_name:
                    self.problems.append(f"{name} in {file_name} is not listed there by the index")
                elif name in tensors:
                    both = f"{tensors[name].file} and {file_name}"
                    self.problems.append(f"{name} is in both {both}")
                else:
                    tensors[name] = tensor
        for name in sorted((weight_map or {}).keys() - tensors.keys()):
            self.problems.append(f"{name} is listed by the index but not in {weight_map[name]}")  # type: ignore[index]
        return tensors

    def read_rows(self, name: str, start: int, stop: int, out: np.ndarray) -> None:
        """Reads rows of a tensor, all dims but the last flattened, into a contiguous array."""
        tensor = self.tensors[name]
        width = tensor.row_bytes
        view = bytes_of(out)
        assert len(view) == (stop - start) * width
        assert tensor.start + stop * width <= tensor.stop
        self._files[tensor.file].read_into(view, tensor.start + start * width)

    def check_unchanged(self) -> None:
        """Refuses files that were changed since they were opened (exit code 65)."""
        for file in self._files.values():
            file.check_unchanged()

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Asks the system to read rows of a tensor ahead."""
        tensor = self.tensors[name]
        first = tensor.start + start * tensor.row_bytes
        self._files[tensor.file].prefetch(first, first + (stop - start) * tensor.row_bytes)

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read_index(folder: Path) -> dict[str, str] | None:
    path = safe_path(folder, INDEX_NAME)
    try:
        weight_map = read_json(path, max_bytes=MAX_HEADER_BYTES).get("weight_map")
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad_file(path, "weight_map: expected an object of tensor -> file")
    for name in weight_map.values():
        plain = isinstance(name, str) and name.endswith(".safetensors")
        if not plain or any(part in name for part in ("/", "\\", "\0")) or name.startswith(".."):
            raise bad_file(path, f"weight_map names {name!r}, not a plain .safetensors file name")
        if len(name) > 255 or not name.isprintable():
            raise bad_file(path, f"weight_map names {name[:40]!r}..., which no file can be called")
    if (folder / SINGLE_NAME).exists() and set(weight_map.values()) != {SINGLE_NAME}:
        raise MixtralError(
            f"{folder} has both {SINGLE_NAME} and {INDEX_NAME}, which names other files",
            fix="remove the one that is not the model",
            code=BAD_DATA,
        )
    return weight_map


def _weight_files(folder: Path) -> set[str]:
    if (folder / SINGLE_NAME).exists():
        return {SINGLE_NAME}
    if not folder.is_dir():
        fix = "name the folder of a published checkpoint"
        raise MixtralError(f"no such folder: {folder}", fix=fix, code=INPUT_NOT_FOUND)
    names = {path.name for path in folder.iterdir()}
    native = {name for name in names if NATIVE_FILE.fullmatch(name)}
    whole = "consolidated.safetensors"
    if whole in native and len(native) > 1:
        raise MixtralError(
            f"{folder} has both {whole} and {min(native - {whole})}",
            fix="remove the one that is not the model",
            code=BAD_DATA,
        )
    if native:
        return native
    refuse_pickles(folder, names)
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    if shards:
        raise MixtralError(
            f"{folder} has {shards[0]}, but {INDEX_NAME} is missing",
            fix="download it from where the shards came from",
            code=INPUT_NOT_FOUND,
        )
    raise MixtralError(
        f"no {SINGLE_NAME}, {INDEX_NAME} or {whole} in {folder}",
        fix="name the folder of a published checkpoint",
        code=INPUT_NOT_FOUND,
    )


def refuse_pickles(place: Path | str, names: Iterable[str]) -> None:
    """Raises exit code 65 if pickles are among the files of a folder, or of a repository."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise MixtralError(
            f"{place}/{pickles[0]} is a pickle, which can run code when read, and is refused",
            fix=f"resave as safetensors: {_resave(place, pickles[0])}",
            code=BAD_DATA,
        )


def _resave(folder: Path | str, pickle: str) -> str:
    """The command that turns the pickles of a folder into safetensors."""
    place = json.dumps(str(folder))
    if pickle.startswith("consolidated"):
        code = (
            "import glob, torch; from safetensors.torch import save_file; "
            "[save_file({k: v.clone() for k, v in "
            'torch.load(f, map_location="cpu", weights_only=True).items()}, '
            'f.rpartition(".")[0] + ".safetensors") '
            f'for f in glob.glob({place} + "/consolidated*.pt*")]'
        )
    else:
        code = (
            "from transformers import AutoModelForCausalLM as M; "
            f'M.from_pretrained({place}, dtype="auto").save_pretrained("NEW_FOLDER")'
        )
    return f"python -c {shlex.quote(code)}"


def safe_path(folder: Path, name: str) -> Path:
    """A file of a checkpoint folder, or exit code 65 for a link that leaves it (see Checkpoint)."""
    path = folder / name
    if path.is_symlink():
        home = folder.resolve()
        target = path.resolve()
        blobs = home.parent.parent / "blobs"
        if target.parent not in (home, blobs):
            raise bad_file(path, f"a link that leaves the checkpoint, to {target}")
    return path
