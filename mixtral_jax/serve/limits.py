"""What an engine takes, and the shapes that it needs for that."""

from __future__ import annotations

import dataclasses

from mixtral_jax.decode.generate import PREFILL_CHUNK
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.language_model import LanguageModel
from mixtral_jax.serve.device import DevicePlan
from mixtral_jax.serve.request import EngineLimits
from mixtral_jax.serve.scheduler import MAX_WAITING_TOKENS
from mixtral_jax.serve.slots import FEWEST_ROWS, plan_classes

_MOST_TOTAL_TOKENS = 4096  # of a request, unless asked for more
_SMALLEST_CHUNK = 16
_MAY_BE_ZERO = ("prefix_cache_bytes", "waiting_served_ratio", "max_waiting_tokens")
_TAIL = 32  # prompts shorter than this, or ends of prompts, are read by a smaller program


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How much the engine takes; TGI's names and meanings where it has them.

    Attributes:
        max_input_tokens: of a prompt; all of ``max_total_tokens`` but one, if None.
        max_total_tokens: of a prompt and its answer; what the model has positions for, up to
            4096, if None.
        max_batch_prefill_tokens: prompt tokens being read at one time; 4096, or the longest
            prompt, if None.
        max_batch_total_tokens: tokens of all running requests; of all slots, if None (see
            ``plan_classes``).
        max_batch_size: requests that run at one time; as many as there are slots, if None.
        max_concurrent_requests: waiting and running; further ones are refused.
        waiting_served_ratio: fewer waiting requests than this share of the running ones wait for
            up to ``max_waiting_tokens`` steps.
        max_waiting_tokens: see there.
        prefill_chunk: prompt tokens read between two calls of decoding, and the unit of the
            prefix cache.
        prefill_rows: prompts that are read at one time.
        prefix_cache_bytes: kept keys and values of prompts; 0 keeps none.
        steps_per_call: tokens that a row writes between two looks from outside, while others wait;
            twice as many while nobody does.
    """

    max_input_tokens: int | None = None
    max_total_tokens: int | None = None
    max_batch_prefill_tokens: int | None = None
    max_batch_total_tokens: int | None = None
    max_batch_size: int | None = None
    max_concurrent_requests: int = 128
    waiting_served_ratio: float = 0.3
    max_waiting_tokens: int = MAX_WAITING_TOKENS
    prefill_chunk: int = 256
    prefill_rows: int = 4
    prefix_cache_bytes: int = 256 << 20
    steps_per_call: int = 4

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            least = 0 if name in _MAY_BE_ZERO else 1
            if value is not None and not value >= least:
                what = "--" + name.replace("_", "-")
                raise MixtralError(what, expected=f"at least {least}", got=value, code=USAGE)
        chunk = self.prefill_chunk
        if chunk & (chunk - 1) or not _SMALLEST_CHUNK <= chunk <= PREFILL_CHUNK:
            expected = f"a power of two from {_SMALLEST_CHUNK} to {PREFILL_CHUNK}"
            raise MixtralError("--prefill-chunk", expected=expected, got=chunk, code=USAGE)


def plan_limits(
    lm: LanguageModel, options: EngineOptions, num_adapters: int = 0
) -> tuple[EngineLimits, DevicePlan]:
    """What an engine takes, and the shapes it needs for that.

    Raises:
        MixtralError: exit code 64 for limits that do not fit each other or the model.
    """
    longest = lm.config.max_position_embeddings
    total = options.max_total_tokens or min(longest, _MOST_TOTAL_TOKENS)
    inputs = options.max_input_tokens or total - 1
    prefill = options.max_batch_prefill_tokens or max(4096, inputs)
    for what, is_fine, expected, got in (
        ("--max-total-tokens", total <= longest, f"at most {longest} (the model's)", total),
        ("--max-input-tokens", inputs < total, f"less than --max-total-tokens {total}", inputs),
        ("--max-batch-prefill-tokens", prefill >= inputs, f"at least {inputs}", prefill),
    ):
        if not is_fine:
            raise MixtralError(what, expected=expected, got=got, code=USAGE)
    strategy = getattr(lm.placement, "strategy", None)
    shares_rows = strategy is not None and strategy.attention == "tensor"
    # Fewer than multiple * spread would leave all rows, and their caches, to every device of the
    # expert axis.
    multiple, spread = FEWEST_ROWS * lm.spec.data, 1 if shares_rows else lm.spec.expert
    classes = plan_classes(
        total,
        max_batch_total_tokens=options.max_batch_total_tokens,
        max_batch_size=options.max_batch_size,
        multiple=multiple,
        spread=spread,
    )
    slots = tuple((c.length, c.rows) for c in classes)
    all_tokens = options.max_batch_total_tokens or sum(n * rows for n, rows in slots)
    limits = EngineLimits(
        max_input_tokens=inputs,
        max_total_tokens=total,
        max_batch_prefill_tokens=prefill,
        max_batch_total_tokens=all_tokens,
        max_concurrent_requests=options.max_concurrent_requests,
        max_batch_size=options.max_batch_size,
        waiting_served_ratio=options.waiting_served_ratio,
        slots=slots,
    )
    chunk = options.prefill_chunk
    least = multiple * spread
    scratch_rows = -(-options.prefill_rows // least) * least
    sizes = (chunk,) if chunk <= _TAIL else (_TAIL, chunk)
    plan = DevicePlan(
        classes=classes,
        scratch_rows=scratch_rows,
        chunk=chunk,
        sizes=sizes,
        kv_dtype=lm.kv_dtype,
        num_adapters=num_adapters,
    )
    return limits, plan
