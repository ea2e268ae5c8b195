"""All data read, checked, cut and kept: counts, the digest, and bad lines by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, USAGE, MixtralError
from mixtral_jax.finetune.data.encode import Example, Pair, encode_dpo, encode_sft
from mixtral_jax.finetune.data.examples import Examples, load_examples
from tests.test_chat import V1, V3, assistant, user

ULTRACHAT = [
    {
        "prompt": f"question {i}",
        "prompt_id": f"{i:064x}",
        "messages": [user(f"question {i}"), assistant("the cat"), user("and?"), assistant("hi")],
    }
    for i in range(7)
]
ULTRAFEEDBACK = [
    {
        "prompt": f"question {i}",
        "chosen": [user(f"question {i}"), assistant("the cat sat on the mat")],
        "rejected": [user(f"question {i}"), assistant("no")],
        "messages": [user(f"question {i}"), assistant("the cat sat on the mat")],
        "score_chosen": 8.5,
    }
    for i in range(4)
]


def write_lines(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def same(example: Example | Pair, other: Example | Pair) -> bool:
    if isinstance(example, Pair) and isinstance(other, Pair):
        return all(same(one, two) for one, two in zip(example, other, strict=True))
    assert isinstance(example, Example)
    assert isinstance(other, Example)
    return all(np.array_equal(one, two) for one, two in zip(example, other, strict=True))


def test_a_published_chat_set_works_as_downloaded(tmp_path: Path):
    folder = tmp_path / "ultrachat_200k" / "data"
    folder.mkdir(parents=True)
    for shard, part in enumerate((ULTRACHAT[:4], ULTRACHAT[4:])):
        table = pyarrow.Table.from_pylist(part)
        parquet.write_table(table, folder / f"train_sft-0000{shard}-of-00002-4d1b.parquet")
        parquet.write_table(table, folder / f"test_sft-0000{shard}-of-00002-4d1b.parquet")
    examples = load_examples([folder / "train_sft-*"], V1, max_length=256)
    assert len(examples) == 7
    for i, row in enumerate(ULTRACHAT):
        assert same(examples[i], encode_sft({"messages": row["messages"]}, V1))
    assert (examples.num_truncated, examples.num_skipped, examples.notes()) == (0, 0, [])
    assert examples.num_tokens == examples.lengths.sum()
    assert 0 < examples.num_targets < examples.num_tokens
    with pytest.raises(MixtralError, match="test_sft; train_sft"):
        load_examples([folder], V1, max_length=256)


def test_a_published_preference_set_works_as_downloaded(tmp_path: Path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ULTRAFEEDBACK), path)
    examples = load_examples([path], V3, max_length=256, method="dpo")
    assert (len(examples), examples.is_pairs) == (4, True)
    for i, row in enumerate(ULTRAFEEDBACK):
        assert same(examples[i], encode_dpo(row, V3))
    as_sft = load_examples([path], V3, max_length=256)
    assert (len(as_sft), as_sft.is_pairs) == (4, False)


def test_the_digest_is_that_of_the_tokens(tmp_path: Path):
    lines = write_lines(tmp_path / "a.jsonl", ULTRACHAT)
    other = write_lines(tmp_path / "b.jsonl", ["", *ULTRACHAT])
    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ULTRACHAT), table)
    digest = load_examples([lines], V1, max_length=256).digest
    assert load_examples([other], V1, max_length=256).digest == digest
    assert load_examples([table], V1, max_length=256).digest == digest
    changed: list[tuple[list[Any], dict[str, Any]]] = [
        ([*ULTRACHAT[1:], ULTRACHAT[0]], {}),
        (ULTRACHAT[1:], {}),
        (ULTRACHAT, {"tokenizer": V3}),
        (ULTRACHAT, {"max_length": 40}),
        ([{"prompt": row["messages"][:3], "completion": "hi"} for row in ULTRACHAT], {}),  # marks
    ]
    for rows, change in changed:
        options: dict[str, Any] = {"tokenizer": V1, "max_length": 256} | change
        assert load_examples([write_lines(lines, rows)], **options).digest != digest


def example(num_prompt: int, num_answer: int) -> Example:
    total = num_prompt + num_answer
    return Example(np.arange(1, total + 1, dtype=np.int32), np.arange(total) >= num_prompt)


def test_long_examples_are_cut_and_those_without_an_answer_skipped():
    encoded = [example(3, 5), example(3, 6), example(7, 9), example(8, 1), example(20, 5)]
    examples = Examples(encoded, max_length=8)
    assert examples.lengths.tolist() == [8, 8, 8]
    assert (examples.num_truncated, examples.num_skipped) == (2, 2)
    assert same(examples[1], Example(encoded[1].ids[:8], encoded[1].is_target[:8]))
    assert examples.notes() == [
        "2 of 5 examples were cut to --max-length",
        "2 of 5 examples skipped: nothing left to score",
    ]


def test_a_pair_is_skipped_with_either_of_its_answers():
    encoded = [
        Pair(example(3, 5), example(3, 2)),
        Pair(example(8, 1), example(2, 2)),
        Pair(example(2, 2), example(8, 1)),
        Pair(example(3, 9), example(3, 9)),
    ]
    examples = Examples(encoded, max_length=8)
    assert examples.lengths.tolist() == [8, 5, 8, 8]
    assert (len(examples), examples.num_truncated, examples.num_skipped) == (2, 1, 2)
    with pytest.raises(IndexError):
        examples[2]


@pytest.mark.parametrize("rows", [[], ["", " "], [{"text": ""}]])
def test_no_example_at_all(tmp_path: Path, rows: list[Any]):
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        MixtralError, match=r"data .*a\.jsonl: expected something to score"
    ) as caught:
        load_examples([path], V1, max_length=8)
    assert caught.value.code == BAD_DATA


def failure(*names: Path, **options: Any) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        load_examples(names, V1, **{"max_length": 64, **options})
    assert "\n" not in str(caught.value)
    return caught.value


def test_one_bad_line_is_named_by_file_and_line(tmp_path: Path):
    good = write_lines(tmp_path / "good.jsonl", ULTRACHAT)
    bad = write_lines(tmp_path / "bad.jsonl", [ULTRACHAT[0], "", '{"messages": [', ULTRACHAT[1]])
    error = failure(good, bad)
    assert error.code == BAD_DATA
    where = f"a bad line in the data: {bad} line 3: the line: expected a JSON object"
    assert str(error).startswith(where)
    write_lines(bad, [ULTRACHAT[0], "", ULTRACHAT[1]])
    assert len(load_examples([good, bad], V1, max_length=64)) == 9


def test_the_last_line_of_all_is_checked_before_anything_is_given(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", [*ULTRACHAT, {"messages": [user("a")]}])
    told = str(failure(path))
    assert f"{path} line 8: messages: expected an answer of the assistant" in told


def test_several_bad_lines_are_told_in_order(tmp_path: Path):
    faults = [{"text": 3}, {"messages": [user("a"), assistant("")]}, "nonsense", {"a": 1}]
    rows = [one for fault in faults for one in ({"text": "good"}, fault)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    table = tmp_path / "b.parquet"
    parquet.write_table(pyarrow.table({"question": ["a", "b"]}), table)
    told = str(failure(path, table))
    places = [f"{path} line {n}: " for n in (2, 4, 6, 8)] + [f"{table} row {n}: " for n in (1, 2)]
    assert told.startswith(f"6 bad lines in the data: {places[0]}")
    assert [told.index(place) for place in places] == sorted(told.index(place) for place in places)
    assert "messages[1]" in told
    assert "expected messages, prompt with completion, or text, got question" in told


def test_a_file_of_another_format_is_told_after_ten_lines(tmp_path: Path):
    path = write_lines(tmp_path / "a.csv", [f"a,{i}" for i in range(1000)])
    told = str(failure(path))
    assert "10 bad lines in the data (there may be more): " in told
    assert f"{path} line 10: " in told
    assert f"{path} line 11: " not in told


def test_options_and_names_are_checked(tmp_path: Path):
    assert failure(tmp_path / "none.jsonl").code == INPUT_NOT_FOUND
    path = write_lines(tmp_path / "a.jsonl", ULTRACHAT)
    error = failure(path, max_length=1)
    assert error.code == USAGE
    assert "--max-length: expected at least 2, got 1" in str(error)
    assert "columns: expected chosen and rejected" in str(failure(path, method="dpo"))
