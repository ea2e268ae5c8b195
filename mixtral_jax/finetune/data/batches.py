"""Rows to batches: the order, the part of it that a process brings, and a state to go on from.

Batches are made of one endless sequence of rows: epoch after epoch, each shuffled anew. The row at
place ``k`` of the sequence follows from the data, the seed and ``k`` alone, so the state is a
number, and every process finds its part of a batch by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from mixtral_jax.errors import BAD_DATA, USAGE, MixtralError
from mixtral_jax.finetune.data.encode import Example, Pair
from mixtral_jax.finetune.data.examples import Examples
from mixtral_jax.finetune.data.packing import alone, best_fit

# How people know what a state is compared by.
_TOLD = {
    "data": "digest of the training data (as this tokenizer and --max-length read it)",
    "length": "--max-length",
    "packing": "--packing",
    "accumulation": "--gradient-accumulation-steps",
    "rows_per_step": "rows of a step (of all devices)",
    "seed": "--seed",
}


_MOST_TOLD = 10  # examples


class Batch(NamedTuple):
    """What one step learns from: A accumulation steps of B rows (of this process) of T tokens.

    Of pairs, the first half of the rows are chosen ones, the second half their rejected ones.
    """

    tokens: np.ndarray  # int32 [A, B, T], 0 in padding
    targets: np.ndarray  # int32 [A, B, T]: the token behind each of a sequence, 0 where none is
    weights: np.ndarray  # float32 [A, B, T]: what the target counts in the loss; 1 if scored
    segments: np.ndarray  # int32 [A, B, T]: 1, 2, ... the sequences of a row, 0 padding


class Batches:
    """Batches without end, the same in every run with the same arguments.

    Args:
        examples: the data.
        rows: B of this part. Two rows make a pair.
        accumulation: A, the batches whose gradients one step adds up.
        length: T; no sequence is longer.
        packing: fills rows with several examples; pairs are never packed.
        seed: in [0, 2^32), of the order.
        prompt_weight: what a token counts that is not scored, as one of a prompt; padding is 0.
        part_id: which part of every batch is given. All parts, one behind the other, are the batch
            that a single process with all rows would get (of pairs: the same pairs, each part
            having its chosen ones first).
        num_parts: of a batch.

    Attributes:
        num_rows: rows (of pairs: pairs) of an epoch.
        rows_per_step: of them that a step takes, all parts of it.
        steps_per_epoch: steps until every row was seen; the last may go on into the next epoch.
        num_tokens: of the last batch, all parts of it, without padding.

    Raises:
        MixtralError: exit code 64 if the rows do not make pairs, or a sequence is longer than T.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        rows: int,
        accumulation: int,
        length: int,
        packing: bool,
        seed: int,
        prompt_weight: float = 0.0,
        part_id: int = 0,
        num_parts: int = 1,
    ):
        _check_fits(examples, rows, length)
        self._examples, self._shape = examples, (accumulation, rows, length)
        self._part_id, self._num_parts = part_id, num_parts
        self._seed, self._prompt_weight = seed, prompt_weight
        self._packing = alone(len(examples))
        self._is_packed = packing and not examples.is_pairs
        if self._is_packed:
            self._packing = best_fit(examples.lengths, length)
        self.num_rows = self._packing.num_rows
        self._units = rows // 2 if examples.is_pairs else rows  # of B: pairs, or rows
        self.rows_per_step = accumulation * num_parts * self._units
        self.steps_per_epoch = -(-self.num_rows // self.rows_per_step)
        self._order = _Order(self.num_rows, seed)
        self._rows_taken = self.num_tokens = 0
        num_sequences = 2 if examples.is_pairs else 1
        self._lengths = examples.lengths.reshape(-1, num_sequences).sum(axis=1)  # of examples

    @property
    def epoch(self) -> float:
        """How many times the data was gone through."""
        return self._rows_taken / self.num_rows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        places = self._places(self._rows_taken)
        everywhere = range(self._rows_taken, self._rows_taken + self.rows_per_step)
        rows = (self._packing.row(self._order[place]) for place in everywhere)
        self.num_tokens = sum(int(self._lengths[row].sum()) for row in rows)
        self._rows_taken += self.rows_per_step
        return self._batch([self._order[place] for place in places])

    def once(self) -> Iterator[Batch]:
        """Every row once, in a fixed order, to evaluate with; the state does not change.

        The last batch is filled up with empty rows: padding only, nothing scored.
        """
        for begin in range(0, self.num_rows, self.rows_per_step):
            places = self._places(begin)
            yield self._batch([place if place < self.num_rows else None for place in places])

    def state(self) -> dict[str, Any]:
        """What ``restore`` needs to go on behind the batches given so far; fit for JSON."""
        return {"rows_taken": self._rows_taken, **self._made_of()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where the ``Batches`` of this state were. The number of parts may differ.

        Raises:
            MixtralError: exit code 65 if the state is of other data or another order.
        """
        for name, value in self._made_of().items():
            if state.get(name) != value:
                expected = f"{state.get(name)} as in the checkpoint"
                what, fix = _TOLD[name], "resume with the same, or name another output folder"
                raise MixtralError(what, expected=expected, got=value, fix=fix, code=BAD_DATA)
        rows_taken = state.get("rows_taken")
        if not isinstance(rows_taken, int) or rows_taken < 0:
            what, fix = "rows_taken of the checkpoint", "resume from another checkpoint"
            raise MixtralError(what, expected="a count", got=rows_taken, fix=fix, code=BAD_DATA)
        self._rows_taken = rows_taken

    def describe(self, state: Mapping[str, Any]) -> str:
        """The examples of this process in the step that comes behind a state, for people.

        They are counted from 1, in the order in which the data was read, without those skipped.
        """
        row_ids = [self._order[place] for place in self._places(state["rows_taken"])]
        numbers = sorted({int(i) + 1 for row_id in row_ids for i in self._packing.row(row_id)})
        more = f" and {len(numbers) - _MOST_TOLD} more" if len(numbers) > _MOST_TOLD else ""
        return f"examples {', '.join(map(str, numbers[:_MOST_TOLD]))}{more} of the data"

    def _made_of(self) -> dict[str, Any]:
        accumulation, _, length = self._shape
        return {
            "data": self._examples.digest,
            "length": length,
            "packing": self._is_packed,
            "accumulation": accumulation,
            "rows_per_step": self.rows_per_step,
            "seed": self._seed,
        }

    def _places(self, begin: int) -> list[int]:
        """This process's places in the sequence of rows, for the step that begins at ``begin``."""
        units = self._units
        begins = range(begin, begin + self.rows_per_step, self._num_parts * units)
        own = self._part_id * units
        return [start + own + unit for start in begins for unit in range(units)]

    def _batch(self, row_ids: Sequence[int | None]) -> Batch:
        dtypes = (np.int32, np.int32, np.float32, np.int32)
        batch = Batch(*(np.zeros(self._shape, dtype) for dtype in dtypes))
        # [A, answers, units, T]: of pairs, answer 0 is the chosen one.
        shape = (self._shape[0], -1, self._units, self._shape[-1])
        views = Batch(*(part.reshape(shape) for part in batch))
        for n, row_id in enumerate(row_ids):
            a, unit = divmod(n, self._units)
            used = 0
            packed = [] if row_id is None else self._packing.row(row_id)
            for segment, example_id in enumerate(packed, start=1):
                one = self._examples[int(example_id)]
                sequences = one if isinstance(one, Pair) else (one,)
                for answer, sequence in enumerate(sequences):
                    free = Batch(*(view[a, answer, unit, used:] for view in views))
                    _write(sequence, segment, free, self._prompt_weight)
                used += len(sequences[0].ids)
        return batch


def _write(sequence: Example, segment: int, free: Batch, prompt_weight: float) -> None:
    """Puts a sequence at the beginning of what is free of a row, of each part ``[t]``."""
    count = len(sequence.ids)
    free.tokens[:count] = sequence.ids
    free.targets[: count - 1] = sequence.ids[1:]
    free.weights[: count - 1] = np.where(sequence.is_target[1:], 1.0, prompt_weight)
    free.segments[:count] = segment


class _Order:
    """The row at each place of the endless sequence."""

    def __init__(self, num_rows: int, seed: int):
        self._num_rows, self._seed = num_rows, seed
        self._epoch, self._row_ids = -1, np.arange(num_rows)

    def __getitem__(self, place: int) -> int:
        epoch, at = divmod(place, self._num_rows)
        if epoch != self._epoch:
            self._epoch, self._row_ids = epoch, _shuffled(self._num_rows, self._seed, epoch)
        return int(self._row_ids[at])


def _shuffled(num_rows: int, seed: int, epoch: int) -> Int64[np.ndarray, " rows"]:
    """A permutation: the rows sorted by random numbers.

    The raw numbers of a bit generator are the same in all versions of numpy (NEP 19); those of
    ``Generator.permutation`` need not be, and a resumed run must go on in the same order.
    """
    draws = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
    return np.argsort(draws, kind="stable")


def _check_fits(examples: Examples, rows: int, length: int) -> None:
    if examples.is_pairs and rows % 2:
        what, fix = "rows of a batch of pairs", f"{rows + 1} rows"
        raise MixtralError(what, expected="an even number", got=rows, fix=fix, code=USAGE)
    longest = int(examples.lengths.max())
    if longest > length:
        expected, fix = f"at least {longest}, the longest example", f"--max-length {longest}"
        raise MixtralError("--max-length", expected=expected, got=length, fix=fix, code=USAGE)
