"""Checkpoints by their name on the Hugging Face Hub, through huggingface_hub and its cache.

Only what a conversion reads is fetched: safetensors, their index, configuration and tokenizer.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.config import CONFIG_NAME, NATIVE_NAME
from mixtral_jax.convert.companions import COMPANIONS
from mixtral_jax.convert.quantized.methods import FILES
from mixtral_jax.convert.reader import INDEX_NAME, NATIVE_FILE, refuse_pickles
from mixtral_jax.errors import INPUT_NOT_FOUND, IO_ERROR, USAGE, MixtralError
from mixtral_jax.tokenizer import find_tokenizer

EMBEDDED = "tiny"
EMBEDDED_FOLDER = Path(__file__).parents[1] / "data" / EMBEDDED

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[\w./-]{{1,100}}))?", re.ASCII)
_NAMES = "name a checkpoint folder, tiny (the embedded model), or org/name of the Hub"
_WEIGHTS = "*.safetensors"
_SMALL = (CONFIG_NAME, NATIVE_NAME, INDEX_NAME, "*.model", "*.model.v*", *COMPANIONS, *FILES)


class Source(NamedTuple):
    """A folder to read; for one of the Hub, its repository and the commit that was taken."""

    folder: Path
    repo: str | None = None
    revision: str | None = None


def resolve(name: str | Path, note: Callable[[str], None] = lambda line: None) -> Source:
    """Finds the folder of a checkpoint, fetching it from the Hub if it is named so.

    Args:
        name: ``tiny``, a folder, or ``org/name[@revision]`` where no such folder exists.
        note: called with one line if the cache is used because the Hub cannot be asked, or a
            folder here has the name of the embedded model.

    Raises:
        MixtralError: exit code 64 for no name at all; 66 if it is neither, or the Hub has no such
            repository, revision or right to read it, or it is not in the cache and there is no
            network; 65 if it has only pickles; 74 if the network fails under way (what was fetched
            is kept).
    """
    if str(name) == EMBEDDED:
        if Path(EMBEDDED).exists():
            note(f"{EMBEDDED} is the embedded model; ./{EMBEDDED} names the folder here")
        return Source(EMBEDDED_FOLDER)
    if name == "":
        raise MixtralError("no checkpoint is named", fix=_NAMES, code=USAGE)
    folder = Path(name)
    if folder.is_dir():
        return Source(folder)
    match = _NAME.fullmatch(str(name))
    if match is None or folder.exists() or isinstance(name, Path):
        what = "not a folder" if folder.exists() else "no such folder"
        raise MixtralError(
            f"{what}: {name}",
            fix=_NAMES,
            code=INPUT_NOT_FOUND,
        )
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise MixtralError(
            f"no such folder: {name}",
            fix="check the path; to fetch that name from the Hub: pip install 'mixtral-jax[hub]'",
            code=INPUT_NOT_FOUND,
        ) from None
    return _Repository(huggingface_hub, match["repo"], match["revision"], note).fetch()


class _Repository:
    def __init__(self, library: Any, repo: str, revision: str | None, note: Callable[[str], None]):
        self.library, self.repo, self.revision, self.note = library, repo, revision, note
        self.name = f"{repo}@{revision}" if revision else repo

    def fetch(self) -> Source:
        errors = self.library.errors
        if self.library.constants.HF_HUB_OFFLINE:
            return self._cached("HF_HUB_OFFLINE is set")
        try:
            info = self.library.HfApi().model_info(self.repo, revision=self.revision)
        except errors.GatedRepoError:
            raise self._refused(
                f"access to {self.repo} must be asked for",
                f"accept its terms at https://huggingface.co/{self.repo}, then: hf auth login",
            ) from None
        except errors.RevisionNotFoundError:
            raise self._refused(
                f"{self.repo} has no revision {self.revision!r}",
                "name a branch, tag or commit of it",
            ) from None
        except errors.RepositoryNotFoundError:
            raise self._refused(
                f"no folder {self.name} here, and no such repository on the Hub, or no right to it",
                "check the name; for a private one: hf auth login",
            ) from None
        except Exception as error:  # of the network, by whatever library
            return self._cached(f"the Hub cannot be reached ({_first_line(error)})")
        names = [sibling.rfilename for sibling in info.siblings or ()]
        files = wanted(names)
        if not fnmatch.filter(files, _WEIGHTS):
            refuse_pickles(self.repo, names)
        try:
            folder = self.library.snapshot_download(
                self.repo, revision=info.sha, allow_patterns=[*map(_literal, files)]
            )
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk, not the network
            raise MixtralError(
                f"fetching {self.name} failed: {_first_line(error)}",
                fix="run the same command again; what was fetched is kept",
                code=IO_ERROR,
            ) from None
        return Source(Path(folder), self.repo, info.sha)

    def _cached(self, why: str) -> Source:
        try:
            folder = self.library.snapshot_download(
                self.repo, revision=self.revision, local_files_only=True
            )
        except Exception:
            raise self._refused(
                f"{self.name} is neither a folder nor in the cache, and {why}",
                "fetch it where there is a network, or name a folder",
            ) from None
        folder = Path(folder)
        if find_tokenizer(folder) is None:
            self.note(f"the cache holds no tokenizer of {self.repo}: the weights come alone")
        self.note(f"{why}: using {self.repo} at {folder.name} from the cache")
        return Source(folder, self.repo, folder.name)

    def _refused(self, what: str, fix: str) -> MixtralError:
        return MixtralError(what, fix=fix, code=INPUT_NOT_FOUND)


def wanted(files: Iterable[str]) -> list[str]:
    """The files of a repository that a conversion reads, of all that it has.

    Only those at its root. Where weights are there in two layouts, those of Hugging Face.
    """
    files = [file for file in files if os.sep not in file]
    weights = fnmatch.filter(files, _WEIGHTS)
    others = [file for file in weights if not NATIVE_FILE.fullmatch(file)]
    small = {file for pattern in _SMALL for file in fnmatch.filter(files, pattern)}
    return sorted(small.union(others or weights))


def _literal(name: str) -> str:
    """A pattern that matches this name only."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
