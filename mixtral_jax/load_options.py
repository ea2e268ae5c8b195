"""LoadOptions: where a model lies and how its rows reach their experts."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from mixtral_jax.config import DTYPES
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels.scaled_kv import KV_DTYPES, KVDtype
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.quantize.makers import DataFree
from mixtral_jax.sharding.dispatch import DispatchOptions, Method, Overflow
from mixtral_jax.sharding.strategy import Attention, Strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Where a model lies and how its rows reach their experts.

    Attributes:
        mesh: ``1x8`` (data x expert), ``2x4x2`` (and tensor) or ``data=2,expert=4``; all
            accelerators on the expert axis, if None.
        dtype: of weights and activations; the checkpoint's, if None (the embedded model: float32).
        dispatch: ``auto`` chooses by the number of rows (see sharding/dispatch.py).
        capacity_factor: rows offered per expert by all_to_all, as a multiple of a balanced load.
        overflow: beyond the capacity, ``exact`` falls back to a dropless path, ``drop`` drops and
            reports how many, of the whole batch.
        sliding_window: tokens; asks for a window that the checkpoint's config does not have.
        verify: check the digests of a converted checkpoint while it loads.
        adapter: a folder with a PEFT LoRA adapter, applied on top of the weights.
        attention: ``data``: each device of the expert axis has rows of its own; ``tensor``: they
            share the heads of the same rows (latency at small batches).
        kv_dtype: ``int8`` or ``fp8`` keys and values in the cache, with a scale for each head of
            each position; those of the activations, if None.
        quantize: attention and experts in int8, int4, nf4, fp8 or fp4, or experts alone in qmoe,
            made while they load (see ``python -m mixtral_jax.quantize`` for more choices, and to do
            it once).
        kernels: visit (the CPU's), gpu, tpu or reference (slow): what computes; chosen by the
            mesh's devices, if None.
    """

    mesh: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    dispatch: Method = "auto"
    capacity_factor: float = DispatchOptions.capacity_factor
    overflow: Overflow = DispatchOptions.overflow
    sliding_window: int | None = None
    verify: bool = True
    adapter: str | None = None
    attention: Attention = Strategy.attention
    kv_dtype: KVDtype | None = None
    quantize: DataFree | None = None
    kernels: str | None = None

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in DTYPES:
            expected = ", ".join(DTYPES)
            raise MixtralError("--dtype", expected=expected, got=repr(self.dtype), code=USAGE)
        if self.kv_dtype is not None and self.kv_dtype not in KV_DTYPES:
            expected = ", ".join(KV_DTYPES)
            raise MixtralError("--kv-dtype", expected=expected, got=repr(self.kv_dtype), code=USAGE)
        if self.quantize is not None and self.quantize not in get_args(DataFree):
            expected, got = ", ".join(get_args(DataFree)), repr(self.quantize)
            raise MixtralError("--quantize", expected=expected, got=got, code=USAGE)
        if self.kernels is not None and self.kernels not in tuple(KERNELS):
            expected = ", ".join(KERNELS)
            raise MixtralError("--kernels", expected=expected, got=repr(self.kernels), code=USAGE)
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or window < 1):
            expected = "a positive integer"
            raise MixtralError("--sliding-window", expected=expected, got=window, code=USAGE)
