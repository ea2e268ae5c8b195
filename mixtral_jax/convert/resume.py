"""Which leaves of an earlier run need not be made again.

Most leaves are bytes of the source, whatever machine copies them. Some are solved for, with sums
that round in another way on another machine: parts of one matrix must then come from one run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol, runtime_checkable

from mixtral_jax.convert.journal import Journal
from mixtral_jax.convert.manifest import LeafRecord


@runtime_checkable
class MadeTogether(Protocol):
    """Leaves some of which are made in one go, and only fit others of the same run."""

    @property
    def machine(self) -> Mapping[str, Any]:
        """What their bytes depend on beside the source and the options; for JSON."""
        ...

    def together(self, leaf: str) -> str:
        """Leaves of which this is the same are kept together, or made again; a leaf that needs
        no other is itself."""
        ...


def resume(
    journal: Journal,
    source: object,
    leaves: Collection[str],
    is_intact: Callable[[str, LeafRecord], bool],
    note: Callable[[str], None],
) -> None:
    """Leaves in ``journal.finished`` what is sound and whole, and forgets the rest.

    Args:
        journal: of this and earlier runs.
        source: what leaves are read from, perhaps ``MadeTogether``.
        leaves: the paths of all.
        is_intact: whether the disk still holds what was recorded.
        note: called with one line for each leaf that was changed meanwhile, and if this is another
            machine than the one before.
    """
    lost = {leaf for leaf in leaves if leaf not in journal.finished}
    for leaf, record in journal.finished.items():
        if not is_intact(leaf, record):
            note(f"{leaf} is no longer as it was written, and is converted again")
            lost.add(leaf)
    if isinstance(source, MadeTogether):
        groups = {source.together(leaf) for leaf in lost}
        lost |= {leaf for leaf in leaves if source.together(leaf) in groups}
    stale = sorted(lost & journal.finished.keys())
    if stale:
        journal.forget(stale)
    if journal.finished:
        note(f"resuming: {len(journal.finished)} of {len(leaves)} leaves are finished")
    if isinstance(source, MadeTogether):
        before = journal.work_on(source.machine)
        others = [key for key, value in source.machine.items() if before.get(key) != value]
        is_mixed = any(source.together(leaf) != leaf for leaf in journal.finished)
        if is_mixed and before and others:
            was = ", ".join(f"{key} {before.get(key)}" for key in others)
            note(f"begun on another machine ({was}): the digest will be that of neither alone")
