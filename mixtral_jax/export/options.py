"""What can be asked of an export, and what it reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, TypeAlias

from mixtral_jax.config import ModelConfig
from mixtral_jax.decode.generate import row_bucket, slot_bucket
from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.kernels.scaled_kv import KVDtype
from mixtral_jax.quantize.makers import DataFree
from mixtral_jax.sharding.mesh import MeshSpec

Platform: TypeAlias = Literal["cpu", "cuda", "tpu"]
# dense is for plans alone: it computes every expert for every token.
KernelsRow: TypeAlias = Literal["visit", "gpu", "tpu", "reference"]
LARGEST_CONTEXT = 4096  # unless more is asked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Shapes that the programs are made for, and how they compute."""

    platform: Platform
    """Where the programs will run."""
    rows: int = 1
    """Prompts at a time; rounded up as sample does it: 2, 4, 8, ... for each data shard."""
    context: int | None = None
    """Tokens of a row, prompt and answer, that the cache has room for; the model's longest, at most
    4096, unless given. With a sliding window rows may be longer."""
    prefill_chunk: int = 128
    """Prompt tokens that a call of prefill reads."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and activations; the checkpoint's unless given (the embedded model: float32)."""
    quantize: DataFree | None = None
    """Quantize attention and experts on the way, as sample does while it loads."""
    kv_dtype: KVDtype | None = None
    """int8 or fp8 keys and values in the cache; those of the activations unless given."""
    sliding_window: int | None = None
    """Tokens; asks for a window that the checkpoint's config does not have."""
    kernels: KernelsRow | None = None
    """What computes; that of the platform unless given (visit, gpu, tpu). gpu holds Pallas-Triton
    kernels, which only the release of jax that made them is sure to run; tpu is plain XLA, for
    cuda too."""
    mesh: str = "1x1"
    """Devices that the programs are made for, data x expert, as 1x8."""
    overwrite: bool = False
    """Replace the programs that DIR has for this platform."""

    def __post_init__(self):
        for name in ("rows", "context", "prefill_chunk", "sliding_window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                option = "--" + name.replace("_", "-")
                raise MixtralError(option, expected="at least 1", got=value, code=USAGE)
        MeshSpec.parse(self.mesh)

    def sizes(self, config: ModelConfig, mesh: MeshSpec) -> Sizes:
        """The shapes for a model.

        Raises:
            MixtralError: exit code 64 for a context that is longer than the model's.
        """
        most = config.max_position_embeddings
        context = self.context or min(most, LARGEST_CONTEXT)
        if context > most:
            expected = f"at most {most} (max_position_embeddings)"
            raise MixtralError("--context", expected=expected, got=context, code=USAGE)
        chunk, window = min(self.prefill_chunk, context), config.sliding_window
        slots = slot_bucket(config, context, chunk)
        # A ring that holds the window and a chunk is enough for a row of any length.
        is_ring = window is not None and slots >= window + chunk - 1
        return Sizes(
            rows=row_bucket(self.rows, mesh.data),
            slots=slots,
            prefill_chunk=chunk,
            max_tokens=most if is_ring else min(slots, most),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Static sizes of programs.

    Attributes:
        rows: prompts that a call takes.
        slots: of the cache, per row.
        prefill_chunk: prompt tokens per row that a call of prefill reads.
        max_tokens: of a row, prompt and answer.
    """

    rows: int
    slots: int
    prefill_chunk: int
    max_tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported.

    Attributes:
        platform: of the programs.
        kernels: the row of the kernels table that they were made of.
        mesh: data x expert.
        program_bytes: of each program, by file name.
        weight_bytes: of the files of weights.
        digest: of the weights; see convert/manifest.py.
        seconds: in all.
        peak_rss_bytes: anonymous memory of the process.
    """

    platform: str
    kernels: str
    mesh: str
    program_bytes: Mapping[str, int]
    weight_bytes: int
    digest: str
    seconds: float
    peak_rss_bytes: int
