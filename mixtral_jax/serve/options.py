"""Options of ``python -m mixtral_jax.serve``: TGI's launcher flags, with their meanings, and ours.

Needs no jax: the HTTP side reads these too.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mixtral_jax.errors import USAGE, MixtralError
from mixtral_jax.sharding.cluster import ProcessOptions

EMBEDDED = "tiny"  # as in convert/hub.py, which needs jax
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")

# TGI's name -> what our loader makes; None where the checkpoint itself has to be so quantized.
SCHEMES: dict[str, str | None] = {
    "int8": "int8",
    "int4": "int4",
    "nf4": "nf4",
    "fp4": "fp4",
    "fp8": "fp8",
    "bitsandbytes": "int8",
    "bitsandbytes-nf4": "nf4",
    "bitsandbytes-fp4": "fp4",
    "eetq": "int8",
    "gptq": None,
    "awq": None,
    "marlin": None,
    "compressed-tensors": None,
}
_METHODS = {"marlin": "gptq"}  # a GPU's layout of the same checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """What is served, and where its parts lie."""

    model_id: str | None = None
    """CHECKPOINT, as TGI's launcher spells it."""
    revision: str | None = None
    """Branch, tag or commit of a checkpoint on the Hugging Face Hub."""
    mesh: str | None = None
    """1x8 (data x expert), 2x4x2 (and tensor) or data=2,expert=4."""
    num_shard: int | None = None
    """N devices that share the experts: --mesh 1xN."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and activations; the checkpoint's, if not given."""
    quantize: str | None = None
    """int8, int4, nf4, fp4, fp8, bitsandbytes, bitsandbytes-nf4, bitsandbytes-fp4, eetq: made while
    loading. gptq, awq, marlin, compressed-tensors: the checkpoint has to be so quantized."""
    attention: Literal["data", "tensor"] | None = None
    """On a mesh: data, each device of the expert axis has requests of its own; tensor, they share
    the heads of the same requests (latency of few)."""
    kv_cache_dtype: Literal["int8", "fp8", "fp8_e4m3fn"] | None = None
    """Keys and values in the cache; those of the activations, if not given."""
    capacity_factor: float | None = None
    """Rows offered per expert, as a multiple of a balanced load."""
    overflow: Literal["exact", "drop"] | None = None
    """Beyond the capacity: exact falls back to a dropless path, drop drops and counts."""
    lora_adapters: str | None = None
    """LoRA adapters that requests may name: NAME=FOLDER,NAME=FOLDER."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchFlags:
    """What runs at one time."""

    max_concurrent_requests: int = 128
    """Requests running or waiting; further ones are refused with 429."""
    max_input_tokens: int | None = None
    """Of a prompt; all of --max-total-tokens but one, if not given."""
    max_total_tokens: int | None = None
    """Of a prompt and its answer; what the model has positions for, up to 4096, if not given."""
    max_batch_prefill_tokens: int | None = None
    """Prompt tokens read at one time."""
    max_batch_total_tokens: int | None = None
    """Prompt and answer tokens of everything that runs, which is the memory for keys and values; of
    about 8 requests of each length (128, 512, ...), if not given."""
    max_batch_size: int | None = None
    """Requests running at one time."""
    waiting_served_ratio: float = 0.3
    """Fewer waiting requests than this share of the running ones wait a little."""
    max_waiting_tokens: int = 20
    """For so many steps at most."""
    prefill_chunk: int = 256
    """Prompt tokens read between two calls of decoding, and the unit of the prefix cache."""
    prefix_cache_bytes: int = 256 << 20
    """Keys and values kept of prompts, for later ones that begin alike and have the same API key; 0
    keeps none."""
    steps_per_call: int = 4
    """Tokens that a row writes between two looks from outside."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestFlags:
    """What one request may ask for."""

    max_best_of: int = 8
    """Samples per prompt (n, best_of)."""
    max_stop_sequences: int = 4
    """Stop strings per request."""
    max_stop_bytes: int = 256
    """Bytes per stop string."""
    max_top_n_tokens: int = 20
    """Best tokens reported beside each generated one."""
    max_client_batch_size: int = 32
    """Prompts per request (/v1/completions)."""
    disable_grammar_support: bool = False
    """Refuse grammars and response formats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HttpFlags:
    """Where the server listens and what it bears. Timeouts are in seconds."""

    host: str = "127.0.0.1"
    """Address to listen on; any but this machine's own needs a key or --insecure."""
    port: int = 3000
    """0 takes a free one."""
    insecure: bool = False
    """Listen to other machines without an API key."""
    api_key_file: Path | None = None
    """File with one API key a line (or one in the environment: API_KEY)."""
    cors_allow_origin: tuple[str, ...] = ()
    """Origin of web pages that may call this server; repeat it, or * for any."""
    payload_limit: int = 2_000_000
    """Bytes of a request body."""
    header_limit: int = 65_536
    """Bytes of a request's headers."""
    json_depth: int = 64
    """Nesting of a request body."""
    header_timeout: float = 10.0
    """For a request's headers to arrive."""
    body_timeout: float = 30.0
    """For a request's body to arrive."""
    write_timeout: float = 30.0
    """For a client to read what was sent."""
    request_timeout: float = 600.0
    """For a whole answer."""
    graceful_termination_timeout: float = 90.0
    """For running requests to end after SIGTERM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchFlags:
    """What the server tells about itself."""

    prometheus_port: int | None = None
    """A port of its own for /metrics, without a key; it stays on the main port too."""
    json_output: bool = False
    """Log JSON lines."""
    log_prompts: bool = False
    """Log the text of prompts and answers as well."""
    otlp_endpoint: str | None = None
    """Send traces there: OTLP over HTTP, such as http://localhost:4318 (TGI's is over gRPC)."""
    otlp_service_name: str = "mixtral-jax"
    """Name of this service in traces."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Serves a Mixtral checkpoint over HTTP: the APIs of Text Generation Inference and OpenAI.

    CHECKPOINT is a folder that convert wrote, a Hugging Face folder, or 'tiny', the embedded model.
    The environment variables of TGI's launcher count where an option is not given: MODEL_ID,
    NUM_SHARD, MAX_INPUT_TOKENS, PORT, API_KEY, ...
    """

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[CHECKPOINT]")] = (
        EMBEDDED
    )
    """A checkpoint folder, 'tiny', or org/name[@revision] on the Hugging Face Hub."""
    debug: bool = False
    """Show tracebacks."""
    model: tyro.conf.OmitArgPrefixes[ModelFlags] = dataclasses.field(default_factory=ModelFlags)
    batch: tyro.conf.OmitArgPrefixes[BatchFlags] = dataclasses.field(default_factory=BatchFlags)
    request: tyro.conf.OmitArgPrefixes[RequestFlags] = dataclasses.field(
        default_factory=RequestFlags
    )
    http: tyro.conf.OmitArgPrefixes[HttpFlags] = dataclasses.field(default_factory=HttpFlags)
    watch: tyro.conf.OmitArgPrefixes[WatchFlags] = dataclasses.field(default_factory=WatchFlags)
    processes: tyro.conf.OmitArgPrefixes[ProcessOptions] = dataclasses.field(
        default_factory=ProcessOptions
    )

    def __post_init__(self):
        model = self.model
        if model.model_id is not None and self.checkpoint not in (EMBEDDED, model.model_id):
            got = f"{self.checkpoint} and --model-id {model.model_id}"
            _refuse("what to serve", "one checkpoint", got, "name it once")
        if model.num_shard is not None and model.mesh is not None:
            got = f"--mesh {model.mesh} and --num-shard {model.num_shard}"
            _refuse("the mesh", "one of --mesh and --num-shard", got, "drop --num-shard")
        if model.quantize is not None and model.quantize not in SCHEMES:
            _refuse("--quantize", ", ".join(SCHEMES), repr(model.quantize), "choose one of them")
        for group in (model, self.batch, self.request, self.http, self.watch):
            _check_numbers(group)
        _adapters(model.lora_adapters)

    @property
    def source(self) -> str:
        """What to load: ``tiny``, a folder, or ``org/name[@revision]``."""
        name = self.model.model_id or self.checkpoint
        revision = self.model.revision
        is_here = name == EMBEDDED or Path(name).is_absolute() or Path(name).exists()
        # As in TGI, what lies here has no revision.
        return name if revision is None or is_here or "@" in name else f"{name}@{revision}"

    @property
    def adapters(self) -> dict[str, str]:
        """Folder of each LoRA adapter by the name that requests use."""
        return _adapters(self.model.lora_adapters)

    @property
    def checkpoint_method(self) -> str | None:
        """How the checkpoint itself has to be quantized, or None where that was not asked."""
        asked = self.model.quantize
        return None if asked is None or SCHEMES[asked] is not None else _METHODS.get(asked, asked)

    def load_fields(self) -> dict[str, Any]:
        """Keyword arguments for LoadOptions: only what differs from its own defaults."""
        model = self.model
        kv_dtype = model.kv_cache_dtype
        fields = {
            "mesh": model.mesh if model.num_shard is None else f"1x{model.num_shard}",
            "dtype": model.dtype,
            "quantize": None if model.quantize is None else SCHEMES[model.quantize],
            "attention": model.attention,
            "kv_dtype": "fp8" if kv_dtype == "fp8_e4m3fn" else kv_dtype,
            "capacity_factor": model.capacity_factor,
            "overflow": model.overflow,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def engine_fields(self) -> dict[str, Any]:
        """Keyword arguments for the engine's options."""
        return dataclasses.asdict(self.batch)


def _adapters(text: str | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in (text or "").split(","):
        name, equals, folder = part.strip().partition("=")
        if not part.strip():
            continue
        # TGI also takes a bare folder, which is then its own name.
        folder = folder if equals else name
        if not name or not folder or name in found:
            _refuse("--lora-adapters", "NAME=FOLDER,NAME=FOLDER", repr(part), "name each once")
        found[name] = folder
    return found


LAST_PORT = 65535
_PORTS = {"port", "prometheus_port"}
_MAY_BE_ZERO = {"port", "waiting_served_ratio", "prefix_cache_bytes", "max_waiting_tokens"}


def _check_numbers(group: Any) -> None:
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        flag = "--" + field.name.replace("_", "-")
        least = 0 if field.name in _MAY_BE_ZERO else 1e-9
        if not least <= value < float("inf"):
            _refuse(flag, "a positive number", value, "choose another, or leave it out")
        if field.name in _PORTS and value > LAST_PORT:
            _refuse(flag, f"at most {LAST_PORT}", value, "choose another, or leave it out")


def _refuse(what: str, expected: str, got: object, fix: str) -> None:
    raise MixtralError(what, expected=expected, got=got, fix=fix, code=USAGE)
