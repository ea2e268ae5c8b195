"""What an earlier run left: kept leaf by leaf, or only together with what was made with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixtral_jax.convert.journal import Journal
from mixtral_jax.convert.manifest import LeafRecord
from mixtral_jax.convert.resume import MadeTogether, resume

LEAVES = ("embed", "a.codes", "a.scales", "b.codes", "b.scales")
RECORD = LeafRecord(shape=(1,), dtype="uint8", chunks=("0",))


class Pairs:
    """Codes and scales are made in one go."""

    def __init__(self, jax: str = "1"):
        self.machine = {"jax": jax, "cpus": 2}

    def together(self, leaf: str) -> str:
        return leaf.partition(".")[0]


def run(folder: Path, source: object, *, new: tuple[str, ...] = (), damaged: str = "") -> Any:
    """Resumes and finishes some leaves; gives those that were kept, and the notes."""
    notes: list[str] = []
    journal = Journal(folder / "journal.jsonl", {"of": "this"})
    resume(journal, source, LEAVES, lambda leaf, record: leaf != damaged, notes.append)
    kept = set(journal.finished)
    for leaf in new:
        journal.record(leaf, RECORD)
    journal.close()
    return kept, notes


@pytest.mark.parametrize(
    ("source", "kept"),
    [(Pairs(), {"embed", "a.codes", "a.scales"}), (object(), set(LEAVES[:4]))],
)
def test_leaves_are_kept_with_all_that_were_made_with_them(tmp_path, source, kept):
    assert isinstance(source, MadeTogether) == isinstance(source, Pairs)
    assert run(tmp_path, source, new=LEAVES[:4]) == (set(), [])
    found, notes = run(tmp_path, source)
    assert (found, notes) == (kept, [f"resuming: {len(kept)} of 5 leaves are finished"])


def test_what_was_dropped_stays_dropped_though_its_record_was_written(tmp_path):
    """The second run makes the codes again and dies; the third must not take the old scales."""
    run(tmp_path, Pairs(), new=LEAVES)
    kept, notes = run(tmp_path, Pairs(), new=("a.codes",), damaged="a.codes")
    assert kept == {"embed", "b.codes", "b.scales"}
    assert "a.codes is no longer as it was written" in notes[0]
    kept, _ = run(tmp_path, Pairs(), new=("a.codes", "a.scales"))
    assert kept == {"embed", "b.codes", "b.scales"}
    assert run(tmp_path, Pairs())[0] == set(LEAVES)


def test_another_machine_is_told_where_it_goes_on_with_what_one_had_made(tmp_path):
    run(tmp_path, Pairs(), new=("embed", "a.codes"))
    kept, notes = run(tmp_path, Pairs("2"), new=("a.codes", "a.scales"))
    assert (kept, len(notes)) == ({"embed"}, 1)  # what is kept is a copy of the source
    kept, notes = run(tmp_path, Pairs())
    assert len(kept) == 3
    assert notes[1].startswith("begun on another machine (jax 2):")
    assert len(run(tmp_path, Pairs())[1]) == 1
