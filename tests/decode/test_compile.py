"""Programs are compiled for buckets, not for prompts, budgets or routing."""

from __future__ import annotations

import jax
import pytest

from mixtral_jax.decode.generate import Generation, Request, row_bucket
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.sharding.mesh import MeshSpec
from mixtral_jax.sharding.place import place
from mixtral_jax.sharding.placement import MeshPlacement
from tests.models import random_model

COMPILED: list[str] = []


def _record(event: str, duration_secs: float, **kwargs: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILED.append(str(kwargs["fun_name"]))


jax.monitoring.register_event_duration_secs_listener(_record)


@pytest.fixture(autouse=True)
def _from_nothing():
    jax.clear_caches()
    COMPILED.clear()


def compiles(name: str) -> int:
    return sum(f"({name})" in compiled for compiled in COMPILED)


@pytest.mark.parametrize(
    ("text", "window", "kv_dtype"),
    [(None, None, None), ("1x8", 16, "int8")],
    ids=["local", "1x8, window 16, int8"],
)
def test_decode_step_compiles_once(small_config, text, window, kv_dtype):
    config = small_config(initializer_range=0.2, sliding_window=window)
    model, placement = random_model(config), LOCAL
    if text is not None:
        mesh = MeshSpec.parse(text).build()
        model, placement = place(model, mesh), MeshPlacement(mesh)

    def generate(length: int, options: SamplingOptions) -> None:
        request = Request(prompt_ids=tuple(range(3, 3 + length)), options=options)
        generation = Generation(model, [request], placement=placement, kv_dtype=kv_dtype)
        written = sum(len(c.token_ids[0]) for c in generation.chunks())
        assert written == options.max_new_tokens

    for length in (1, 7, 15):
        for budget in (5, 40):  # 40 takes two calls: the second meets the state of the first
            generate(length, SamplingOptions(max_new_tokens=budget, ignore_eos=True))
    generate(9, SamplingOptions(max_new_tokens=5, ignore_eos=True, temperature=0.7, top_p=0.9))
    assert compiles("decode_step") == 1
    assert compiles("prefill") == 1
    generate(60, SamplingOptions(max_new_tokens=5, ignore_eos=True))  # another chunk of prefill
    assert compiles("decode_step") == 1
    assert compiles("prefill") == 2
    generate(3, SamplingOptions(max_new_tokens=125, ignore_eos=True))
    assert compiles("decode_step") == 1, "five more tokens must fit the bucket"


def test_another_bucket_does_compile(small_config):
    """The negative control of the count."""
    model = random_model(small_config(max_position_embeddings=512, num_local_experts=2))
    for budget in (5, 200):
        request = Request(prompt_ids=(3, 4), options=SamplingOptions(max_new_tokens=budget))
        list(Generation(model, [request], placement=LOCAL).chunks())
    assert compiles("decode_step") == 2


@pytest.mark.parametrize(
    ("rows", "data", "bucket"), [(1, 1, 2), (2, 1, 2), (3, 1, 4), (5, 2, 8), (1, 8, 16)]
)
def test_rows_are_padded_to_a_bucket(rows, data, bucket):
    assert row_bucket(rows, data) == bucket
