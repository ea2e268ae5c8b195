"""The rolling cache: step by step equals all at once, through wrap-around and ragged rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.kernels.attention import attends
from mixtral_jax.kernels.scaled_kv import KV_DTYPES, ScaledKV
from mixtral_jax.model.cache import advance, init_cache, num_slots, write_kv
from tests.models import REFERENCE, forward, random_model, random_tokens

F32 = 1e-4


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("chunk", [1, 4, 5])
def test_chunks_equal_one_pass(small_config, window, chunk):
    model = random_model(small_config(sliding_window=window, initializer_range=0.2))
    config, total = model.config, 24
    tokens = random_tokens(config, (2, total))
    lengths = jnp.asarray([total, 17])
    want = forward(model, tokens)
    slots = num_slots(config, total=total, chunk=chunk)
    assert window is None or slots < total, "the ring must wrap"
    cache = init_cache(config, rows=2, slots=slots, dtype=jnp.float32)

    @jax.jit
    def read(model, part, valid, cache):
        hidden = model.hidden(part, valid, cache=cache, placement=REFERENCE)
        return model.unembed(hidden.x), hidden.cache

    for start in range(0, total, chunk):
        part = np.pad(
            tokens[:, start : start + chunk], ((0, 0), (0, max(0, start + chunk - total)))
        )
        steps = start + jnp.arange(chunk)
        valid = steps[None, :] < lengths[:, None]
        logits, cache = read(model, part, valid, cache)
        for row in range(2):
            for t in np.flatnonzero(np.asarray(valid[row])):
                np.testing.assert_allclose(logits[row, t], want[row, start + t], atol=F32)
    assert cache.lengths.tolist() == lengths.tolist()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_chunks_through_a_ring_of_codes_equal_one_chunk(small_config, kv_dtype):
    """What a slot held before leaves no trace, neither in its codes nor in its scales."""
    model = random_model(small_config(sliding_window=6, initializer_range=0.2))
    config, total, chunk = model.config, 24, 4
    tokens = random_tokens(config, (2, total))

    @jax.jit
    def read(part, cache):
        hidden = model.hidden(part, cache=cache, placement=REFERENCE)
        return model.unembed(hidden.x), hidden.cache

    def logits(slots: int, chunk: int) -> np.ndarray:
        cache = init_cache(config, rows=2, slots=slots, dtype=KV_DTYPES[kv_dtype])
        parts = []
        for start in range(0, total, chunk):
            part, cache = read(tokens[:, start : start + chunk], cache)
            parts.append(part)
        return np.concatenate(parts, axis=1)

    whole, slots = logits(total, total), num_slots(config, total=total, chunk=chunk)
    assert slots < total, "the ring must wrap"
    np.testing.assert_allclose(logits(slots, chunk), whole, atol=F32)
    assert np.abs(logits(slots - 1, chunk) - whole).max() > 100 * F32, "one slot less loses a key"
    assert np.abs(forward(model, tokens) - whole).max() > F32, "codes are what was read"


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_padding_writes_no_codes(small_config, kv_dtype):
    dtype = KV_DTYPES[kv_dtype]
    target = init_cache(small_config(), rows=1, slots=4, dtype=dtype).keys[0]
    new = jnp.arange(1.0, 33.0).reshape(1, 2, 2, 8)
    got = write_kv(target, new, jnp.asarray([[2, 4]]))
    assert isinstance(got, ScaledKV)
    assert (got.scales[0] > 0).tolist() == [[False, False, True, False]] * 2  # of each head
    restored = got.widened(jnp.float32)[0] * got.scales[0, ..., None]
    np.testing.assert_allclose(restored[:, 2], new[0, :, 0], rtol=0.07)
    assert not restored[:, jnp.asarray([0, 1, 3])].any()


def test_one_slot_less_would_lose_a_key(small_config):
    """The negative control of the ring's size."""
    config = small_config(sliding_window=6)
    chunk, total = 4, 24
    slots = num_slots(config, total=total, chunk=chunk)
    assert slots == 6 + chunk - 1

    def is_whole(slots: int) -> bool:
        cache = init_cache(config, rows=1, slots=slots, dtype=jnp.float32)
        valid = jnp.ones((1, chunk), bool)
        for _ in range(total // chunk):
            cache, window = advance(cache, valid)
        mask = attends(window.positions, window.key_positions, config.sliding_window)
        return bool((mask.sum(axis=-1) == 6).all())

    assert is_whole(slots)
    assert not is_whole(slots - 1)


def test_full_attention_keeps_every_position(small_config):
    assert num_slots(small_config(), total=100, chunk=16) == 100
