"""LoadOptions: where a model lies and how its rows reach their experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, get_args

from mixtral_jax.config import DTYPES
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels.scaled_kv import KV_DTYPES, KVDtype
from mixtral_jax.kernels.table import KERNELS
from mixtral_jax.offload.ledger import parse_size
from mixtral_jax.quantize.makers import DataFree
from mixtral_jax.sharding.agreement import Facts, file_facts, option_facts
from mixtral_jax.sharding.dispatch import DispatchOptions, Method, Overflow
from mixtral_jax.sharding.mesh import MeshSpec
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
        verify: digests of a converted checkpoint are checked while it loads.
        adapter: a folder with a PEFT LoRA adapter, applied on top of the weights.
        attention: ``data``: each device of the expert axis has rows of its own; ``tensor``: they
            share the heads of the same rows (latency at small batches).
        kv_dtype: ``int8`` or ``fp8`` keys and values in the cache, with a scale for each head of
            each position; those of the activations, if None.
        quantize: attention and experts in int8, int4, nf4, fp8 or fp4, or experts alone in qmoe,
            made while they load (see ``python -m mixtral_jax.quantize`` for more choices, and to do
            it once).
        kernels: visit (the CPU's), gpu, tpu, dense (every expert on every row) or reference (that,
            with all scores of attention at once): what computes; chosen by the mesh's devices, if
            None.
        offload: ``experts``: they stay in host memory, and those in use are copied to the one
            device that runs the rest (docs/offload.md).
        device_memory: with ``offload``, what may be used of the device: 20GB, 512MB; nine tenths
            of what it says it has, if None.
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
    offload: Literal["experts"] | None = None
    device_memory: str | None = None

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
        self.dispatch_options()
        self._check_offload()
        window = self.sliding_window
        if window is not None and (not isinstance(window, int) or window < 1):
            expected = "a positive integer"
            raise MixtralError("--sliding-window", expected=expected, got=window, code=USAGE)

    def _check_offload(self) -> None:
        if self.offload is None:
            if self.device_memory is not None:
                fix = "--offload experts"
                raise MixtralError("--device-memory needs --offload", fix=fix, code=USAGE)
            return
        if self.offload != "experts":
            got = repr(self.offload)
            raise MixtralError("--offload", expected="experts", got=got, code=USAGE)
        if self.device_memory is not None:
            parse_size(self.device_memory)
        if self.mesh is not None and MeshSpec.parse(self.mesh).num_devices > 1:
            raise MixtralError(
                "--offload experts: --mesh",
                expected="1x1: one device, and the host's memory",
                got=self.mesh,
                fix="leave out --mesh, or --offload",
            )
        for name in ("dispatch", "overflow", "attention"):
            if getattr(self, name) != getattr(type(self), name):
                what = f"--offload experts: --{name} is for several devices"
                raise MixtralError(what, fix=f"leave out --{name}", code=USAGE)

    def dispatch_options(self) -> DispatchOptions:
        """How rows travel; refuses what is no such way (exit code 64)."""
        return DispatchOptions(
            method=self.dispatch, capacity_factor=self.capacity_factor, overflow=self.overflow
        )

    def refuse_offload(self, verb: str) -> None:
        """For commands that need the experts on the devices (exit code 64)."""
        if self.offload is not None:
            what = f"{verb} does not run with --offload"
            raise MixtralError(what, fix="leave it out; sample has it", code=USAGE)


def load_facts(asked: LoadOptions, folder: Path) -> Facts:
    """What all processes must load alike."""
    adapter = {} if asked.adapter is None else file_facts(Path(asked.adapter))
    adapter = {f"{name} of the adapter": fact for name, fact in adapter.items()}
    return {**option_facts(asked), **file_facts(folder), **adapter}
