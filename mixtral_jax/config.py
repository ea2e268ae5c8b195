"""What a Mixtral is: ModelConfig, the published presets, and reading it from config.json.

Values of the presets: the config.json files of mistralai/Mixtral-8x7B-v0.1 and 8x22B-v0.1 and
their Instruct versions. Both spellings of transformers are read (v4: ``rope_theta``,
``torch_dtype``; v5: ``rope_parameters``, ``dtype``), and Mistral's params.json.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mixtral_jax import rope_config
from mixtral_jax.errors import BAD_CONFIG, INPUT_NOT_FOUND, MixtralError
from mixtral_jax.json_file import read_json
from mixtral_jax.native_config import spelled_as_config

CONFIG_NAME, NATIVE_NAME = "config.json", "params.json"
DTYPES = ("float32", "bfloat16", "float16")

# Several repackings of Mixtral publish the window of Mistral 7B; the model was trained without one.
MISPUBLISHED_WINDOW = 4096

Note = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A MixtralForCausalLM configuration. Field names are those of transformers.

    Counts are counts, sizes are channels. ``sliding_window`` is in tokens, None for full attention.
    ``dtype`` is the dtype of the published weights.

    Raises:
        MixtralError: exit code 78, if the fields contradict each other.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    dtype: str = "bfloat16"

    def __post_init__(self):
        for name in _POSITIVE:
            _check_count(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            _refuse(
                "num_attention_heads",
                f"a multiple of num_key_value_heads ({self.num_key_value_heads})",
                self.num_attention_heads,
            )
        if self.head_dim % 2:
            _refuse("head_dim", "an even number (RoPE rotates pairs)", self.head_dim)
        if self.num_experts_per_tok > self.num_local_experts:
            _refuse(
                "num_experts_per_tok",
                f"at most num_local_experts ({self.num_local_experts})",
                self.num_experts_per_tok,
            )
        if self.sliding_window is not None:
            _check_count("sliding_window", self.sliding_window)
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            _check_number(name, getattr(self, name))
        for token_id in (self.bos_token_id, *self.eos_token_ids):
            if not _is_integer(token_id) or not 0 <= token_id < self.vocab_size:
                _refuse("bos/eos token id", f"an id below {self.vocab_size}", token_id)
        if not isinstance(self.tie_word_embeddings, bool):
            _refuse("tie_word_embeddings", "true or false", self.tie_word_embeddings)
        if self.dtype not in DTYPES:
            _refuse("dtype", f"one of {', '.join(DTYPES)}", self.dtype)

    @property
    def group_size(self) -> int:
        """Query heads per key/value head: G = H // K."""
        return self.num_attention_heads // self.num_key_value_heads


_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)


# Above any model: what is listed by name must not be listed for minutes.
_MOST = {"num_hidden_layers": 256, "num_local_experts": 1024}


class _FieldError(MixtralError):
    """A field that is wrong by itself, or beside another; where it was read is for the reader."""

    def __init__(self, name: str, expected: str, got: object, source: str | None = None):
        self.field = name, expected, got
        super().__init__(
            f"{source or 'config'} field {name}",
            expected=expected,
            got=repr(got),
            fix="use the file that was published with the weights" if source else "correct it",
            code=BAD_CONFIG,
        )


def _refuse(name: str, expected: str, got: object) -> None:
    raise _FieldError(name, expected, got)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_count(name: str, value: Any) -> None:
    if not _is_integer(value) or value < 1:
        _refuse(name, "a positive integer", value)
    if value > _MOST.get(name, 1 << 31):
        _refuse(name, f"at most {_MOST.get(name, 1 << 31)}", value)


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, float) or _is_integer(value)
    if not is_number or not 0 < value <= sys.float_info.max:
        _refuse(name, "a positive number", value)


_8X7B = ModelConfig()
_8X22B = ModelConfig(
    hidden_size=6144,
    intermediate_size=16384,
    num_hidden_layers=56,
    num_attention_heads=48,
    max_position_embeddings=65536,
)
PRESETS: dict[str, ModelConfig] = {
    "mixtral-8x7b": _8X7B,
    "mixtral-8x7b-instruct": _8X7B,
    "mixtral-8x22b": _8X22B,
    "mixtral-8x22b-instruct": dataclasses.replace(_8X22B, vocab_size=32768),
    # The embedded model of mixtral_jax/data/tiny (a test compares the two).
    "tiny": ModelConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=2048,
        rope_theta=1e4,
    ),
}

# Keys of config.json that would change the maths if they said something else.
_FIXED = {"hidden_act": ("silu",), "attention_bias": (False,), "model_type": ("mixtral",)}
_ALIASES = {"torch_dtype": "dtype"}
# Keys that a published config.json holds and that do not touch what is computed here: about
# training, about transformers itself, or about padding, which never enters a row.
_UNUSED = frozenset([
    "architectures", "attention_dropout", "chunk_size_feed_forward", "id2label",
    "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef",
    "router_jitter_noise", "transformers_version", "use_cache", "_name_or_path", "torch_dtype",
])  # fmt: skip
# Our own key: a window of 4096 that was asked for, kept when it is written and read again.
_DELIBERATE = "sliding_window_is_deliberate"


def config_from_dict(
    raw: Mapping[str, Any],
    *,
    source: str = "config.json",
    sliding_window: int | None = None,
    note: Note = lambda line: None,
) -> ModelConfig:
    """Reads a config.json mapping in the old or the new spelling.

    Args:
        raw: the parsed file.
        source: the file's name, for error lines.
        sliding_window: tokens; asks for this window whatever the file says.
        note: called with one line when a published value is not followed.

    Returns:
        The validated configuration.

    Raises:
        MixtralError: exit code 78 where a field is missing, wrong, or asks for other maths.
    """
    try:
        return _from_dict(dict(raw), source, sliding_window, note)
    except _FieldError as error:
        raise _FieldError(*error.field, source=source) from None


def _from_dict(
    raw: dict[str, Any], source: str, sliding_window: int | None, note: Note
) -> ModelConfig:
    for old, new in _ALIASES.items():
        if raw.get(new) is None:
            raw[new] = raw.get(old)
    for key, allowed in _FIXED.items():
        if raw.get(key, allowed[0]) not in allowed:
            raise MixtralError(
                f"{source} field {key}",
                expected=" or ".join(map(repr, allowed)),
                got=repr(raw[key]),
                fix="only MixtralForCausalLM checkpoints are supported",
                code=BAD_CONFIG,
            )
    missing = [name for name in _REQUIRED if raw.get(name) is None]
    if missing:
        raise MixtralError(
            f"{source} lacks {', '.join(missing)}",
            fix="use the file that was published with the weights",
            code=BAD_CONFIG,
        )
    values: dict[str, Any] = {name: raw[name] for name in _REQUIRED}
    for name, value in values.items():
        _check_count(name, value)
    defaults = {
        "num_key_value_heads": raw["num_attention_heads"],
        "head_dim": raw["hidden_size"] // raw["num_attention_heads"],
    }
    for name, default in defaults.items():
        values[name] = default if raw.get(name) is None else raw[name]
    theta = rope_config.read_rope_theta(raw, source, note)
    _check_number("rope_theta", theta)
    values["rope_theta"] = float(theta)
    values["sliding_window"] = _window(raw, sliding_window, source, note)
    eos = raw.get("eos_token_id", 2)
    eos = [] if eos is None else eos
    values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
    for name in ("rms_norm_eps", "tie_word_embeddings", "initializer_range", "bos_token_id"):
        if raw.get(name) is not None:
            values[name] = raw[name]
    values["dtype"] = str(raw.get("dtype") or "float32").removeprefix("torch.")
    _note_unknown(raw, source, note)
    return ModelConfig(**values)


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)


def _note_unknown(raw: Mapping[str, Any], source: str, note: Note) -> None:
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    read = {*fields, *_FIXED, *rope_config.KEYS, "eos_token_id", "quantization_config"}
    unknown = sorted(key for key in raw if key not in read | _UNUSED | {_DELIBERATE})
    if unknown:
        note(f"{source}: not used: {', '.join(map(repr, unknown))}")


def _window(raw: Mapping[str, Any], asked: int | None, source: str, note: Note) -> Any:
    # Any: a value that is no window at all is refused by ModelConfig.
    if asked is not None:
        return asked
    window = raw.get("sliding_window")
    if isinstance(window, str) and window.isdecimal():
        window = int(window)
    if window == MISPUBLISHED_WINDOW and raw.get(_DELIBERATE) is not True:
        note(
            f"{source}: sliding_window {MISPUBLISHED_WINDOW} is a known publishing mistake for "
            f"Mixtral and is ignored; pass --sliding-window {MISPUBLISHED_WINDOW} to ask for it"
        )
        return None
    return window


def read_config(
    folder: str | Path, *, sliding_window: int | None = None, note: Note = lambda line: None
) -> ModelConfig:
    """Reads ``config.json`` of a checkpoint folder, or ``params.json`` where only that is there.

    Arguments as in ``config_from_dict``.

    Raises:
        MixtralError: exit code 66 without the file, 65 if it is no sound JSON, 78 if unusable.
    """
    path = config_path(Path(folder))
    try:
        raw = read_json(path, fix=f"copy {path.name} from the published checkpoint again")
    except (FileNotFoundError, NotADirectoryError):
        raise MixtralError(
            f"no {CONFIG_NAME} in {folder}",
            fix="name a checkpoint folder, or 'tiny' for the embedded model",
            code=INPUT_NOT_FOUND,
        ) from None
    source = str(path)
    if path.name == NATIVE_NAME:
        raw = spelled_as_config(raw, source=source, max_positions=_published_context, note=note)
    return config_from_dict(raw, source=source, sliding_window=sliding_window, note=note)


def config_path(folder: Path) -> Path:
    """The file that configures a checkpoint: config.json, unless there is only params.json."""
    path, native = folder / CONFIG_NAME, folder / NATIVE_NAME
    return native if native.exists() and not path.exists() else path


def _published_context(raw: Mapping[str, Any]) -> int:
    """max_position_embeddings of the published model of the same sizes; Mixtral 8x7B's if none."""
    sizes = ("hidden_size", "num_hidden_layers", "intermediate_size")
    for preset in PRESETS.values():
        if all(getattr(preset, name) == raw.get(name) for name in sizes):
            return preset.max_position_embeddings
    return _8X7B.max_position_embeddings


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a configuration, readable by transformers 4 and 5."""
    values = dataclasses.asdict(config)
    eos = list(values.pop("eos_token_ids"))
    dtype = values.pop("dtype")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_act": "silu",
        **values,
        **followed_window(config),
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "torch_dtype": dtype,
    }


def followed_window(config: ModelConfig) -> dict[str, Any]:
    """The fields of a config.json whose window every reader takes as we do."""
    is_deliberate = config.sliding_window == MISPUBLISHED_WINDOW
    own = {_DELIBERATE: True} if is_deliberate else {}
    return {"sliding_window": config.sliding_window, **own}
