"""OUTPUT_DIR/checkpoint-N: saved while training goes on, whole or absent, proved before use.

A checkpoint is written in ``checkpoint-N.saving`` by Orbax, in the background; when its files are
complete they are digested (checkpoint_record.py), and one rename makes it ``checkpoint-N``. Older
ones are renamed before they are deleted. So a process that is killed leaves whole checkpoints and
folders that name themselves as rubbish, which the next run removes. Orbax's own retention leaves
listed steps that cannot be restored after a kill, which is why it is not used.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from mixtral_jax.convert.manifest import sync_folder
from mixtral_jax.convert.orbax import is_disk_full
from mixtral_jax.convert.preflight import check_disk
from mixtral_jax.errors import BAD_DATA, IO_ERROR, MixtralError
from mixtral_jax.finetune.checkpoint_record import (
    STATE,
    Leaves,
    OtherVersionError,
    Record,
    Saved,
    problem,
    read_record,
    write_record,
)
from mixtral_jax.sharding import hosts

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,8})")
_SAVING, _DELETING, _DAMAGED = ".saving", ".deleting", ".damaged"
_RUBBISH = re.compile(_NAME.pattern + f"({_SAVING}|{_DELETING})".replace(".", r"\."))


class Checkpoints:
    """The checkpoints of one run, which no other process writes to (output_folder.py).

    Where there are many processes each calls every method, at the same steps.

    Args:
        folder: OUTPUT_DIR.
        limit: how many are kept; None keeps all.
        note: called with one line about a checkpoint that is passed over.
    """

    def __init__(
        self, folder: Path, *, limit: int | None = None, note: Callable[[str], None] = print
    ):
        self.folder, self._limit, self._note = folder, limit, note
        self._saving: Future[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Orbax warns of unused options, and logs tracebacks of errors that it also raises.
        self._logger = logging.getLogger("absl")
        self._level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)
        self.last_step: int | None = None  # saved, or being saved

    def glance(self) -> Record | None:
        """The newest checkpoint that can be read, its arrays unproved: to refuse a run early.

        Raises:
            MixtralError: exit code 65 if it is of another version.
        """
        for step in reversed(self.steps()):
            try:
                return read_record(self.path(step))
            except OtherVersionError:
                raise
            except (MixtralError, OSError):
                continue
        return None

    def newest(self) -> Record | None:
        """The newest checkpoint that is sound; damaged ones that are newer are set aside.

        Raises:
            MixtralError: exit code 65 if all are damaged, or one is of another version; 74 if one
                cannot be read.
        """
        step = -1
        if hosts.is_first():
            self._remove_rubbish()
            step = self._find()
        hosts.barrier("checkpoints are checked", may_wait_for_first=True)
        step = int(hosts.of_first(float(step)))
        if step < 0:
            return None
        self.last_step = step
        return read_record(self.path(step))

    def restore(self, record: Record, abstract: Any) -> Any:
        """The arrays of a checkpoint.

        Args:
            record: of ``newest``.
            abstract: a tree of ShapeDtypeStruct with shardings, of any mesh.

        Raises:
            MixtralError: exit code 65 for leaves of other names, shapes or dtypes, which Orbax
                would cast in silence.
        """
        path = self.path(record.saved.step)
        names, wanted, form = _named(abstract)
        described = _described(names, wanted)
        if described != record.leaves:
            differs = sorted(dict(described.items() ^ dict(record.leaves).items()))[0]
            raise MixtralError(
                f"{path}: {differs}",
                expected=described.get(differs, "no such array"),
                got=record.leaves.get(differs, "no such array"),
                fix="give the options as before, or choose another --output-dir",
                code=BAD_DATA,
            )
        found = ocp.load(str(path / STATE), dict(zip(names, wanted, strict=True)))
        return jax.tree.unflatten(form, [found[name] for name in names])

    def save(self, state: Any, saved: Saved) -> None:
        """Saves in the background, once the checkpoint before is complete.

        The arrays are copied to host memory before this returns: they may then be donated.

        Args:
            state: a tree of arrays.
            saved: the rest.

        Raises:
            MixtralError: exit code 74 if the disk is full, now or at the save before.
        """
        self.wait()
        work = self.path(saved.step).with_suffix(_SAVING)
        names, leaves, _ = _named(state)
        if hosts.is_first():
            check_disk(self.folder, sum(leaf.nbytes for leaf in leaves), work)
            work.mkdir()
        try:
            with _options():
                tree = dict(zip(names, leaves, strict=True))
                response = ocp.save_async(str(work / STATE), tree)
        except Exception as error:
            raise self._failed(work, error) from error
        described = _described(names, leaves)
        self._saving = self._pool.submit(self._complete, response.result, work, saved, described)
        self.last_step = saved.step

    def check(self) -> None:
        """Raises what the save in the background met, if it has ended; never waits.

        Where there are many processes ``wait`` does, in all of them.
        """
        if hosts.num_processes() == 1 and self._saving is not None and self._saving.done():
            self._saving.result()

    def wait(self) -> None:
        """Waits until the last save is complete; raises what it met, here or in another process."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        error = saving.exception()
        hosts.barrier("a checkpoint was written", may_wait_for_first=True)
        has_failed = hosts.is_any(error is not None)
        if error is not None:
            raise error
        if has_failed:
            raise MixtralError(
                "another process could not save a checkpoint",
                fix="look at its own output",
                code=IO_ERROR,
            )

    def close(self) -> None:
        """Waits for what this process does in the background, and raises nothing."""
        with contextlib.suppress(Exception):
            if self._saving is not None:
                self._saving.result()
        self._pool.shutdown()
        self._logger.setLevel(self._level)

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps that have a folder, in order."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def _complete(
        self, written: Callable[[], None], work: Path, saved: Saved, leaves: Leaves
    ) -> None:
        try:
            written()
            if not hosts.is_first():
                return
            write_record(work, saved, leaves)
            sync_folder(work)
            path = self.path(saved.step)
            if path.exists():
                self._delete(path)
            work.rename(path)
            sync_folder(self.folder)
        except Exception as error:
            raise self._failed(work, error) from error
        self._retain()

    def _failed(self, work: Path, error: Exception) -> Exception:
        """What to raise for an error of a save; leaves nothing that fills the disk further."""
        if hosts.is_first():
            shutil.rmtree(work, ignore_errors=True)
        if not is_disk_full(error):
            return error
        kept = ", ".join(f"checkpoint-{step}" for step in self.steps()) or "none"
        return MixtralError(
            f"the disk of {self.folder} is full: {work.stem} was not saved; kept: {kept}",
            fix="free space and run the same command again to resume",
            code=IO_ERROR,
        )

    def _retain(self) -> None:
        if self._limit is not None:
            for step in self.steps()[: -self._limit]:
                self._delete(self.path(step))

    def _delete(self, path: Path) -> None:
        rubbish = path.with_suffix(_DELETING)
        shutil.rmtree(rubbish, ignore_errors=True)
        path.rename(rubbish)
        shutil.rmtree(rubbish, ignore_errors=True)

    def _remove_rubbish(self) -> None:
        for path in self.folder.iterdir():
            if _RUBBISH.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _find(self) -> int:
        """The newest sound step, or -1 where there is no checkpoint at all."""
        damaged: dict[Path, str] = {}
        for step in reversed(self.steps()):
            fault = problem(self.path(step))
            if fault is None:
                for path, told in damaged.items():
                    self._set_aside(path, told)
                return step
            damaged[self.path(step)] = fault
        if damaged:
            told = "; ".join(f"{path.name}: {fault}" for path, fault in damaged.items())
            raise MixtralError(
                f"every checkpoint of {self.folder} is damaged: {told}",
                fix="delete them to begin anew, or choose another --output-dir",
                code=BAD_DATA,
            )
        return -1

    def _set_aside(self, path: Path, fault: str) -> None:
        aside = path.with_suffix(_DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        self._note(f"{path.name} is damaged ({fault}): it is {aside.name} now, and not used")


def _named(tree: Any) -> tuple[list[str], list[Any], Any]:
    """Names, leaves and form of a tree; a name is the path to its leaf, as one word."""
    paths, form = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
    assert len(set(names)) == len(names)
    assert not any("/" in name for name in names)
    return names, [leaf for _, leaf in paths], form


def _described(names: list[str], leaves: list[Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {
        name: (tuple(leaf.shape), leaf.dtype.name) for name, leaf in zip(names, leaves, strict=True)
    }


@contextlib.contextmanager
def _options() -> Iterator[None]:
    """Raw zarr v2 arrays: a save takes about one copy of the state (docs/adr/0004)."""
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = False
    saving.use_zarr3 = False
    saving.use_compression = False
    with context:
        yield
