"""The layered executor writes what the resident model writes, within its budget."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Generator, Sequence

import jax
import numpy as np
import pytest

from mixtral_jax.convert.load import HOST
from mixtral_jax.decode.generate import Generation, Request
from mixtral_jax.decode.sampling import SamplingOptions
from mixtral_jax.errors import BAD_CONFIG, USAGE, MixtralError
from mixtral_jax.model.placement import LOCAL
from mixtral_jax.offload.executor import OffloadExecutor
from mixtral_jax.offload.load import Generating, abstract_parts, least_of
from mixtral_jax.offload.passes import Compiler
from mixtral_jax.quantize.makers import Recipe
from tests.offload.models import both, plain, with_quantized, within, write
from tests.slow import mostly_slow

TOLERANCE = 2e-6  # of log-probabilities in f32: programs are cut elsewhere and may round otherwise
GREEDY = SamplingOptions(max_new_tokens=12, ignore_eos=True)
WARM = dataclasses.replace(GREEDY, temperature=0.9, top_p=0.95, top_k=20, seed=7)


@pytest.fixture(scope="module")
def config(small_config):
    return small_config(initializer_range=0.3, num_hidden_layers=3)


@pytest.fixture(scope="module")
def pair(config):
    return both(config, plain(config))


@pytest.fixture(scope="module")
def prompts():
    draw = np.random.default_rng(5)
    return [draw.integers(3, 64, length).tolist() for length in (40, 1, 23)]


def least(executor: OffloadExecutor, rows: int, context: int, prompt: int) -> int:
    what = Generating(rows=rows, context=context, prompt=prompt)
    return least_of(executor.compiler, what).total


def floor_of(executor: OffloadExecutor) -> int:
    """The least for what it ran last."""
    held = executor.ledger.held
    return executor.ledger.total - held["experts"] + executor.parts.expert_bytes


def fresh(executor: OffloadExecutor) -> Compiler:
    """A compiler of the same model that has compiled nothing yet."""
    return Compiler(executor.parts, executor.compiler.placement, executor.device)


def pieces(executor: OffloadExecutor, rows: Sequence[Sequence[int]]) -> Generator[list[list[int]]]:
    """A generation that can be left open: tokens of each row, a few at a time."""
    requests = [Request(prompt_ids=tuple(ids), options=GREEDY) for ids in rows]
    fields = {"placement": LOCAL, "executor": executor, "prefill_chunk": 16}
    for chunk in Generation(executor.parts.ends, requests, **fields).chunks(4):
        yield chunk.token_ids


def same(one, other) -> bool:
    return one[0] == other[0] and np.allclose(one[1], other[1], atol=TOLERANCE)


@pytest.mark.parametrize("options", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_tokens_are_those_of_the_resident_model(pair, prompts, options):
    """Three rows; a layer of a prompt chooses all 8 experts, and there is room for 1 to 24."""
    resident, first = pair
    expected = write(resident, prompts, options)
    floor, size = least(first, 3, 52, 16), first.parts.expert_bytes
    plenty = within(first, first.ledger.budget)
    assert same(write(plenty, prompts, options), expected)
    assert plenty.report().resident_experts == 24
    rates = []
    for extra in (0, 1, 9):
        executor = within(first, floor + extra * size)
        found = write(executor, prompts, options)
        assert same(found, expected), extra
        report = executor.report()
        assert report.resident_experts == extra + 1
        assert report.peak <= executor.ledger.budget
        assert report.counts.visits > 3 * 8
        rates.append(report.counts.hit_rate)
    assert rates == sorted(rates)
    assert rates[0] < rates[-1] < plenty.report().counts.hit_rate


@pytest.mark.slow
def test_a_long_prompt_alone_is_read_by_chunks(config):
    """A prompt of several chunks through a window shorter than itself."""
    config = dataclasses.replace(config, sliding_window=16)
    prompt = [np.random.default_rng(1).integers(3, 64, 70).tolist()]
    resident, executor = both(config, plain(config))
    expected = write(resident, prompt, GREEDY, prefill_chunk=32)
    assert same(write(executor, prompt, GREEDY, prefill_chunk=32), expected)
    small = within(executor, floor_of(executor) + executor.parts.expert_bytes)
    assert same(write(small, prompt, GREEDY, prefill_chunk=32), expected)


KINDS: dict[str, tuple[Recipe | None, str]] = {
    "int8": (Recipe(scheme="int8"), "visit"),
    "gptq4 in an order": (Recipe(scheme="int4", group_size=32), "visit"),
    "nested nf4": (Recipe(scheme="nf4", double_quant=True), "visit"),
    "stacked": (None, "gpu"),
}


@pytest.mark.parametrize("kind", mostly_slow(KINDS, ["gptq4 in an order"]))
def test_experts_of_any_kind_stay_packed(small_config, prompts, kind):
    """Two layers of three are quantized: programs of two structures in one model."""
    (recipe, kernels), ordered = KINDS[kind], "order" in kind
    config = small_config(
        initializer_range=0.3, num_hidden_layers=3, hidden_size=64, num_local_experts=4
    )
    leaves = with_quantized(plain(config), {0: recipe, 2: recipe}, ordered=ordered)
    resident, executor = both(config, leaves, kernels)
    expected = write(resident, prompts[1:], GREEDY)
    assert same(write(executor, prompts[1:], GREEDY), expected)
    small = within(executor, floor_of(executor) + executor.parts.expert_bytes)
    assert same(write(small, prompts[1:], GREEDY), expected)
    whole = sum(
        w.nbytes for layer in executor.parts.experts for e in layer for w in jax.tree.leaves(e)
    )
    assert executor.ledger.held["experts"] == whole


def test_scores_are_those_of_the_resident_model(pair):
    resident, executor = pair
    tokens = np.random.default_rng(2).integers(3, 64, (2, 32)).astype(np.int32)
    valid = np.ones(tokens.shape, np.bool_)
    valid[1, 20:] = False
    expected = np.asarray(resident.score(tokens, valid))
    found = np.asarray(executor.score(tokens, valid))
    np.testing.assert_allclose(found[valid], expected[valid], atol=TOLERANCE)
    assert not np.allclose(found[0], found[1])


TOKENS = np.random.default_rng(3).integers(3, 64, (2, 32)).astype(np.int32)
VALID = np.ones(TOKENS.shape, np.bool_)


def test_generations_take_turns(pair, prompts):
    """Of other shapes than each other, with scores between two steps."""
    resident, first = pair
    executor = within(first, first.ledger.budget)
    batches = prompts[:1], prompts
    found: list[list[list[int]]] = [[[] for _ in batch] for batch in batches]
    for step in zip(*(pieces(executor, batch) for batch in batches), strict=True):
        executor.score(TOKENS, VALID)
        for rows, written in zip(found, step, strict=True):
            for row, ids in zip(rows, written, strict=True):
                row.extend(ids)
    for batch, rows in zip(batches, found, strict=True):
        assert rows == write(resident, batch, GREEDY)[0]


def test_a_generation_keeps_its_room_until_it_is_dropped(pair, prompts):
    """No other one takes it, nor do scores; where both do not fit the second is refused."""
    first, compiler = pair[1], fresh(pair[1])
    floor = least_of(compiler, Generating(rows=3, context=52, prompt=16)).total
    executor = within(first, floor, compiler=compiler)
    one = pieces(executor, prompts)
    next(one)
    state = executor.ledger.held["state"]
    with pytest.raises(MixtralError, match=r"\(other generations open: 1\)") as error:
        next(pieces(executor, prompts))
    assert error.value.code == BAD_CONFIG
    assert executor.ledger.held["state"] == state
    assert sum(map(len, one)) == 2 * 3, "the first goes on"
    next(pieces(executor, prompts))
    roomy = within(first, 10**9, compiler=compiler)
    left = pieces(roomy, prompts)
    next(left)
    roomy.score(TOKENS, VALID)
    assert roomy.ledger.held["state"] == state
    left.close()
    roomy.score(TOKENS, VALID)
    assert roomy.ledger.held["state"] == 0


class WithCode(Compiler):
    """As a GPU has it; the CPU says of all code that it has no size."""

    @property
    def code_bytes(self) -> int:
        return 1000 * len(self._programs)


def test_code_that_is_not_needed_makes_room(pair, prompts):
    """A process that has met many shapes refuses nothing that would fit alone."""
    first = pair[1]
    compiler = WithCode(first.parts, first.compiler.placement, first.device)
    what = Generating(rows=3, context=52, prompt=16)
    floor = least_of(compiler, what).total
    executor = within(first, floor, compiler=compiler)
    expected = write(executor, prompts, GREEDY)
    loaded = len(first.device.client.live_executables())
    compiler.get("score", 2, 48)
    assert least_of(compiler, what).total > floor
    assert len(first.device.client.live_executables()) > loaded
    assert same(write(executor, prompts, GREEDY), expected)
    assert least_of(compiler, what).total == floor
    gc.collect()
    assert len(first.device.client.live_executables()) <= loaded


def test_a_step_gives_its_state_away(pair, prompts, monkeypatch):
    """Else there were three copies of it: the caller's, what is read and what is written."""
    executor, given = within(pair[1], pair[1].ledger.budget), []
    step = executor.decode_step

    def stepping(state, *arguments):
        given.append(state)
        return step(state, *arguments)

    monkeypatch.setattr(executor, "decode_step", stepping)
    write(executor, prompts, GREEDY)
    assert len(given) == 3
    assert all(state.seen.is_deleted() and state.expert_counts.is_deleted() for state in given)


def on_device(device) -> int:
    """Bytes of what lies on a device, asked of JAX and not of the ledger."""
    return sum(
        x.nbytes
        for x in jax.live_arrays()
        if not x.is_deleted() and x.sharding.device_set == {device}
        if x.sharding.memory_kind != HOST
    )


def test_nothing_lies_on_the_device_that_the_ledger_does_not_know(pair, prompts, monkeypatch):
    """After each expert, and between generations of different sizes."""
    alone(pair)
    budget = least(pair[1], 3, 52, 16) + 4 * pair[1].parts.expert_bytes
    executor = within(pair[1], budget)
    seen: list[tuple[int, int]] = []
    noted = executor._experts.read

    def read(layer, expert, sign):
        noted(layer, expert, sign)
        jax.block_until_ready(sign)
        seen.append((on_device(executor.device), executor.ledger.total))

    monkeypatch.setattr(executor._experts, "read", read)
    for rows in (prompts, prompts[:1], prompts):
        write(executor, rows, GREEDY)
        seen.append((on_device(executor.device), executor.ledger.total))
    assert len(seen) > 100
    assert all(live <= held <= budget for live, held in seen)
    # It measures something: all but what programs need for themselves is there.
    floor = executor.parts.device_bytes + 4 * executor.parts.expert_bytes
    assert max(live for live, _ in seen) > floor
    assert executor.report().peak <= budget


def alone(pair) -> None:
    """Nothing is on the device but the weights of this model: other tests have left."""
    pair[1]._experts.make_room(10**12)
    gc.collect()
    assert on_device(pair[1].device) == pair[1].parts.device_bytes


def test_the_audit_finds_an_expert_that_was_not_taken_away(pair, prompts, monkeypatch):
    """The planted fault of the test above."""
    alone(pair)
    executor = within(pair[1], least(pair[1], 3, 52, 16))
    kept = []
    evict = executor._experts._evict

    def leak(key):
        kept.append(
            jax.device_put(
                np.asarray(executor._experts._entries[key].weights.gate), executor.device
            )
        )
        evict(key)

    monkeypatch.setattr(executor._experts, "_evict", leak)
    write(executor, prompts, GREEDY)
    assert on_device(executor.device) > executor.ledger.total


def test_layers_share_their_programs(pair, prompts):
    """A program of each kind for all layers, and for prompts and budgets of any length."""
    first = pair[1]
    compiler = fresh(first)
    executor = within(first, first.ledger.budget, compiler=compiler)
    write(executor, prompts, GREEDY)
    assert len(compiler._programs) == 2 * len(("begin", "attend", "visit", "end"))
    for length in (9, 2, 11):
        write(executor, [ids[:length] + ids[:1] * 34 for ids in prompts], WARM)
    assert len(compiler._programs) == 2 * len(("begin", "attend", "visit", "end"))


def test_a_budget_too_small_says_the_least(pair, prompts):
    compiler = fresh(pair[1])
    floor = least_of(compiler, Generating(rows=3, context=52, prompt=16)).total
    exact = within(pair[1], floor, compiler=compiler)
    write(exact, prompts, GREEDY)
    assert exact.report().peak == floor
    small = within(pair[1], floor - 1, compiler=compiler)
    with pytest.raises(
        MixtralError, match=r"expected at least \d+MB \(weights .*fix: --device-m"
    ) as e:
        write(small, prompts, GREEDY)
    assert e.value.code == BAD_CONFIG


def test_shapes_alone_give_the_same_least(config, pair):
    parts = abstract_parts(config, {}, "float32")
    what = Generating(rows=3, context=52, prompt=16)
    of_arrays, of_shapes = (
        least_of(Compiler(each, LOCAL, pair[1].device), what) for each in (pair[1].parts, parts)
    )
    assert of_shapes == of_arrays
    assert of_shapes.expert == 3 * 4 * config.hidden_size * config.intermediate_size


def test_drafts_are_refused(pair, prompts):
    with pytest.raises(MixtralError, match="--speculate") as e:
        write(pair[1], prompts, GREEDY, speculate=2)
    assert e.value.code == USAGE


def test_prefetch_changes_times_and_no_token(pair, prompts):
    budget = least(pair[1], 3, 52, 16) + 12 * pair[1].parts.expert_bytes
    found = []
    for prefetch in (True, False):
        executor = within(pair[1], budget, prefetch=prefetch)
        found.append(write(executor, prompts, GREEDY))
        counts = executor.report().counts
        assert (counts.prefetched > 0) == prefetch
        assert (counts.guessed > 0) == prefetch
    assert same(*found)
