"""From tokens to completions, without a model: reasons, stop strings, and what is cut."""

from __future__ import annotations

import pytest

from mixtral_jax.decode.completion import Batch, Completion
from mixtral_jax.decode.generate import Chunk, Progress
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.language_model import EMBEDDED_FOLDER
from mixtral_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(EMBEDDED_FOLDER)
EOS = TOKENIZER.eos_id
FIRST_BYTE = next(i for i in range(TOKENIZER.vocab_size) if TOKENIZER.byte_of(i) == 0)
A, B, C, D = (FIRST_BYTE + byte for byte in b"abcd")


def finished(*chunks: list[int], is_bad: bool = False, **fields) -> tuple[Completion, list[int]]:
    """One row that was given these chunks, and the rows that were asked to stop."""
    batch = Batch([[1]], SamplingOptions(**fields), eos_ids=[EOS], tokenizer=TOKENIZER)
    stopped: list[int] = []
    for ids in chunks:
        logprobs = [-float(i) for i in range(len(ids))]
        batch.take(Chunk(token_ids=[ids], logprobs=[logprobs]), stopped.append)
    batch.finish(Progress(is_bad=[is_bad], dropped=[1, 2]))
    return batch.completions()[0], stopped


@pytest.mark.parametrize(
    ("ids", "fields", "reason", "text"),
    [
        ([A, B], {}, "length", "ab"),
        ([A, EOS], {}, "eos_token", "a"),
        ([EOS], {}, "eos_token", ""),
        ([A, EOS], {"ignore_eos": True}, "length", "a"),
        ([A, EOS, B], {"ignore_eos": True}, "length", "ab"),
        ([A, B], {"stop": ("b",)}, "stop_sequence", "a"),
        ([A, B], {"stop": ("bc",)}, "length", "ab"),
        ([A, B, EOS], {"stop": ("bc",)}, "eos_token", "ab"),
        ([A, B], {"stop": ("ab",)}, "stop_sequence", ""),
    ],
)
def test_reasons(ids, fields, reason, text):
    completion, stopped = finished(ids, **fields)
    assert (completion.finish_reason, completion.generated_text) == (reason, text)
    assert completion.token_ids == ids
    assert completion.error is None
    assert stopped == ([0] if reason == "stop_sequence" else [])


@pytest.mark.parametrize("chunks", [[[A, B, C, D]], [[A, B], [C, D]], [[A], [B], [C], [D]]])
def test_ids_after_a_stop_are_cut(chunks):
    completion, stopped = finished(*chunks, stop=("bc",))
    assert completion.token_ids == [A, B, C]
    assert len(completion.logprobs) == 3
    assert completion.generated_text == "a"
    assert completion.finish_reason == "stop_sequence"
    assert stopped == [0]


def test_an_end_after_the_stop_is_not_the_reason():
    completion, _ = finished([A, EOS], stop=("a",))
    assert completion.finish_reason == "stop_sequence"
    assert completion.token_ids == [A]


def test_nan_logits_are_an_error_without_a_reason():
    completion, _ = finished([A], is_bad=True)
    assert completion.finish_reason is None
    assert "NaN after 1 tokens" in str(completion.error)
    assert completion.generated_text == "a"


def test_nan_logits_after_a_stop_do_not_matter():
    completion, _ = finished([A, B], stop=("a",), is_bad=True)
    assert completion.error is None
    assert completion.finish_reason == "stop_sequence"


def test_dropped_assignments_are_summed_over_layers():
    assert finished([A])[0].dropped == 3


def test_rates_are_zero_where_no_time_was_spent():
    stats = finished([A])[0].stats
    assert (stats.prefill_tokens_per_second, stats.decode_tokens_per_second) == (0, 0)


def test_rates_are_tokens_by_seconds():
    batch = Batch([[1]], SamplingOptions(), eos_ids=[], tokenizer=TOKENIZER)
    batch.finish(
        Progress(
            is_bad=[False],
            prefill_tokens=8,
            prefill_seconds=2.0,
            decode_tokens=9,
            decode_seconds=3.0,
            compile_seconds=5.0,
        )
    )
    stats = batch.completions()[0].stats
    assert stats.prefill_tokens_per_second == 4.0
    assert stats.decode_tokens_per_second == 3.0
    assert stats.compile_seconds == 5.0


def test_rows_are_samples_of_prompts_in_order():
    options = SamplingOptions(num_samples=2)
    batch = Batch([[1, 5], [1, 6]], options, eos_ids=[EOS], prompts=["x", "y"])
    assert batch.prompts == ["x", "x", "y", "y"]
    assert [(r.prompt_ids, r.sample_id) for r in batch.requests] == [
        ((1, 5), 0),
        ((1, 5), 1),
        ((1, 6), 0),
        ((1, 6), 1),
    ]


def test_rows_stop_apart():
    options = SamplingOptions(stop=("b",))
    batch = Batch([[1], [1]], options, eos_ids=[EOS], tokenizer=TOKENIZER)
    stopped: list[int] = []
    chunk = Chunk(token_ids=[[A, C], [A, B]], logprobs=[[0.0, 0.0], [0.0, 0.0]])
    assert batch.take(chunk, stopped.append) == ["ac", "a"]
    assert stopped == [1]


def test_held_back_text_is_shown_at_the_end():
    options = SamplingOptions(stop=("abc",))
    batch = Batch([[1]], options, eos_ids=[EOS], tokenizer=TOKENIZER)
    chunk = Chunk(token_ids=[[D, A, B]], logprobs=[[0.0] * 3])
    assert batch.take(chunk, lambda row: None) == ["d"]
    batch.finish(Progress(is_bad=[False]))
    assert batch.rest(0) == "ab"
    assert batch.completions()[0].generated_text == "dab"


def test_without_a_tokenizer_there_are_ids_only():
    batch = Batch([[1]], SamplingOptions(), eos_ids=[EOS])
    assert batch.take(Chunk(token_ids=[[A, EOS]], logprobs=[[0.0, 0.0]]), lambda row: None) == [""]
    batch.finish(Progress(is_bad=[False]))
    completion = batch.completions()[0]
    assert completion.generated_text is None
    assert completion.token_ids == [A, EOS]
    assert completion.finish_reason == "eos_token"


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(MixtralError, match="--stop needs text") as caught:
        Batch([[1]], SamplingOptions(stop=("a",)), eos_ids=[EOS])
    assert caught.value.code == USAGE
