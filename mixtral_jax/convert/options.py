"""What can be asked of a conversion, and what it reports."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias

from mixtral_jax.convert.export import parse_size
from mixtral_jax.errors import USAGE, MixtralError

Dtype: TypeAlias = Literal["keep", "float32", "bfloat16", "float16"]
DEFAULT_SHARD_SIZE = "5GB"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """How to convert."""

    format: Literal["orbax", "safetensors", "gptq"] = "orbax"
    """Format of the weights in the output folder; safetensors has the names of Hugging Face. gptq:
    the published GPTQ layout, of weights that are in gptq or int4 codes already."""
    dtype: Dtype = "keep"
    """Store the weights in this dtype."""
    adapter: str | None = None
    """A folder with a PEFT LoRA adapter, merged into the weights."""
    dequantize: bool = False
    """Store quantized weights as plain ones, of the config's dtype unless --dtype says another."""
    max_shard_size: str | None = None
    """With safetensors and gptq: most bytes of tensors in one file, as 500MB (5GB unless given)."""
    verify: bool = False
    """Read every leaf back through the format's library, of a finished output too."""
    allow_nonfinite: bool = False
    """Accept NaN and infinite weights."""

    def __post_init__(self):
        if self.max_shard_size is not None:
            if self.format == "orbax":
                fix = "add --format safetensors, or leave it out"
                raise MixtralError("--max-shard-size is for safetensors", fix=fix, code=USAGE)
            parse_size(self.max_shard_size)
        if self.adapter == "":
            fix = "name a folder that peft's save_pretrained wrote, or leave it out"
            raise MixtralError("--adapter", expected="a folder", got="''", fix=fix, code=USAGE)

        if self.format == "gptq":
            for name in ("dtype", "adapter", "dequantize", "verify"):
                if getattr(self, name) not in ("keep", None, False):
                    fix = "leave it out, or choose another --format"
                    raise MixtralError(f"--{name} is not for gptq", fix=fix, code=USAGE)

    @property
    def max_shard_bytes(self) -> int:
        """Most bytes of tensors in one file."""
        return parse_size(self.max_shard_size or DEFAULT_SHARD_SIZE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertReport:
    """What was converted. ``peak_rss_bytes`` is anonymous memory of the process."""

    parameters: int
    tensors: int
    bytes: int
    seconds: float
    peak_rss_bytes: int
    digest: str
