"""Presets equal what was published; config.json is read in both spellings or refused in a line."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import pytest

from mixtral_jax.config import (
    MISPUBLISHED_WINDOW,
    PRESETS,
    ModelConfig,
    config_from_dict,
    config_to_dict,
    read_config,
)
from mixtral_jax.errors import BAD_CONFIG, BAD_DATA, INPUT_NOT_FOUND, MixtralError

# The config.json of mistralai/Mixtral-8x7B-Instruct-v0.1, in the spelling of transformers 4.
PUBLISHED_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
PUBLISHED_8X22B_INSTRUCT = PUBLISHED_8X7B | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
    "router_aux_loss_coef": 0.001,
    "transformers_version": "4.38.0",
    "vocab_size": 32768,
}
PUBLISHED = {
    "mixtral-8x7b": PUBLISHED_8X7B,
    "mixtral-8x7b-instruct": PUBLISHED_8X7B,
    "mixtral-8x22b": PUBLISHED_8X22B_INSTRUCT | {"vocab_size": 32000},
    "mixtral-8x22b-instruct": PUBLISHED_8X22B_INSTRUCT,
}
# The same in the spelling of transformers 5.
V5_8X7B = {
    key: value for key, value in PUBLISHED_8X7B.items() if key not in ("rope_theta", "torch_dtype")
} | {
    "dtype": "bfloat16",
    "head_dim": None,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
}


def refusal(raw: dict[str, Any], **options: Any) -> MixtralError:
    with pytest.raises(MixtralError) as caught:
        config_from_dict(raw, **options)
    assert caught.value.code == BAD_CONFIG
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_equals_what_was_published(name):
    preset, published = PRESETS[name], PUBLISHED[name]
    renamed = {"eos_token_ids": (published["eos_token_id"],), "dtype": published["torch_dtype"]}
    for field in dataclasses.fields(ModelConfig):
        # Both models: 128 channels per head, by division, not in the file.
        expected = (published | renamed | {"head_dim": 128})[field.name]
        assert getattr(preset, field.name) == expected, field.name


def test_every_preset_but_the_embedded_one_is_compared():
    assert {*PUBLISHED, "tiny"} == set(PRESETS)


@pytest.mark.parametrize("raw", [PUBLISHED_8X7B, V5_8X7B], ids=["v4", "v5"])
def test_both_spellings_are_read(raw):
    assert config_from_dict(raw) == PRESETS["mixtral-8x7b"]


def test_values_of_the_file_win_over_defaults():
    raw = V5_8X7B | {
        "rope_parameters": {"rope_theta": 5e4, "rope_type": "default"},
        "dtype": "float16",
        "head_dim": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "initializer_range": 0.5,
        "bos_token_id": 7,
        "eos_token_id": [2, 9],
        "sliding_window": 100,
    }
    config = config_from_dict(raw)
    assert config.rope_theta == 5e4
    assert config.dtype == "float16"
    assert config.head_dim == 64
    assert config.rms_norm_eps == 1e-6
    assert config.tie_word_embeddings is True
    assert config.initializer_range == 0.5
    assert config.bos_token_id == 7
    assert config.eos_token_ids == (2, 9)
    assert config.sliding_window == 100


def test_absent_fields_follow_transformers():
    absent = ("num_key_value_heads", "torch_dtype", "bos_token_id", "eos_token_id")
    config = config_from_dict({k: v for k, v in PUBLISHED_8X7B.items() if k not in absent})
    assert config.num_key_value_heads == config.num_attention_heads
    assert config.dtype == "float32"
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config_from_dict(PUBLISHED_8X7B | {"eos_token_id": None}).eos_token_ids == ()


@pytest.mark.parametrize("order", [("dtype", "torch_dtype"), ("torch_dtype", "dtype")])
def test_a_null_dtype_does_not_hide_the_other_spelling(order):
    values = {"dtype": None, "torch_dtype": "torch.bfloat16"}
    raw = {k: v for k, v in PUBLISHED_8X7B.items() if k != "torch_dtype"}
    assert config_from_dict(raw | {key: values[key] for key in order}).dtype == "bfloat16"


@pytest.mark.parametrize("window", [MISPUBLISHED_WINDOW, str(MISPUBLISHED_WINDOW)])
def test_the_mispublished_window_is_ignored_with_a_note(window):
    notes: list[str] = []
    config = config_from_dict(PUBLISHED_8X7B | {"sliding_window": window}, note=notes.append)
    assert config.sliding_window is None
    (line,) = notes
    assert "--sliding-window 4096" in line


def test_the_window_that_is_asked_for_is_kept_without_a_note():
    notes: list[str] = []
    raw = PUBLISHED_8X7B | {"sliding_window": MISPUBLISHED_WINDOW}
    config = config_from_dict(raw, sliding_window=MISPUBLISHED_WINDOW, note=notes.append)
    assert config.sliding_window == MISPUBLISHED_WINDOW
    assert config_from_dict(raw, sliding_window=64, note=notes.append).sliding_window == 64
    assert notes == []


def test_a_window_written_as_a_string_is_read():
    assert config_from_dict(PUBLISHED_8X7B | {"sliding_window": "512"}).sliding_window == 512


def test_all_missing_fields_are_listed():
    line = str(refusal({"model_type": "mixtral", "vocab_size": 10}, source="some/config.json"))
    assert "some/config.json" in line
    for name in ("hidden_size", "num_local_experts", "max_position_embeddings"):
        assert name in line
    assert "vocab_size" not in line


def test_missing_theta_is_refused():
    raw = {k: v for k, v in PUBLISHED_8X7B.items() if k != "rope_theta"}
    assert "rope_theta" in str(refusal(raw))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("model_type", "llama"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}),
    ],
)
def test_other_maths_is_refused(key, value):
    line = str(refusal(PUBLISHED_8X7B | {key: value}))
    assert "expected" in line
    assert "fix: " in line


BAD_VALUES = [
    ("vocab_size", 0),
    ("hidden_size", "4096"),
    ("hidden_size", 4096.0),
    ("num_hidden_layers", True),
    ("num_attention_heads", 0),
    ("num_attention_heads", "32"),
    ("num_key_value_heads", 0),
    ("num_key_value_heads", 5),
    ("head_dim", 0),
    ("head_dim", 127),
    ("num_experts_per_tok", 9),
    ("sliding_window", 0),
    ("sliding_window", -1),
    ("sliding_window", 12.5),
    ("sliding_window", "many"),
    ("rope_theta", 0),
    ("rope_theta", "a lot"),
    ("rope_theta", float("nan")),
    ("rope_parameters", "default"),
    ("rms_norm_eps", -1e-5),
    ("rms_norm_eps", "small"),
    ("initializer_range", float("inf")),
    ("bos_token_id", 32000),
    ("eos_token_id", -1),
    ("eos_token_id", "</s>"),
    ("eos_token_id", [2, 1.5]),
    ("tie_word_embeddings", "no"),
    ("torch_dtype", "float8"),
]
SHOWN_AS = {"bos_token_id": "token id", "eos_token_id": "token id", "torch_dtype": "dtype"}


@pytest.mark.parametrize(("key", "value"), BAD_VALUES)
def test_bad_values_are_refused_by_name(key: str, value: Any):
    line = str(refusal(PUBLISHED_8X7B | {key: value}))
    assert SHOWN_AS.get(key, key) in line
    assert "expected" in line


def test_config_is_frozen_and_keyword_only():
    config = ModelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        ModelConfig(32000)  # type: ignore[misc]
    assert hash(config) == hash(ModelConfig())


def test_group_size(small_config):
    assert small_config(num_attention_heads=6, num_key_value_heads=2).group_size == 3


@pytest.mark.parametrize("name", PRESETS)
def test_written_and_read_again(name):
    notes: list[str] = []
    raw = json.loads(json.dumps(config_to_dict(PRESETS[name])))
    assert config_from_dict(raw, note=notes.append) == PRESETS[name]
    assert notes == []


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_ids": ()},
        {"eos_token_ids": (2, 3)},
        {"sliding_window": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        {"sliding_window": MISPUBLISHED_WINDOW},
        {"num_key_value_heads": 4, "head_dim": 6, "num_local_experts": 3, "dtype": "float16"},
    ],
)
def test_unusual_fields_survive_being_written(small_config, fields):
    config = small_config(**fields)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_read_from_a_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_8X7B))
    assert read_config(tmp_path) == PRESETS["mixtral-8x7b"]
    assert read_config(tmp_path, sliding_window=8).sliding_window == 8


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, INPUT_NOT_FOUND),
        (b"{", BAD_DATA),
        (b"[]", BAD_DATA),
        (b"\xff{}", BAD_DATA),
        (b"[" * 100_000, BAD_DATA),
        (b"", BAD_DATA),
        ('{"a": 1}'.encode("utf-16"), BAD_DATA),
        (b'{"vocab_size": 1, "vocab_size": 2}', BAD_DATA),
        (b" " * 2_000_000 + b"{}", BAD_DATA),
        (b"{}", BAD_CONFIG),
    ],
    ids=["absent", "cut", "no object", "no text", "deep", "none", "UTF-16", "twice", "huge", "{}"],
)
def test_unreadable_files_get_their_exit_codes(tmp_path, content, code):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(MixtralError) as caught:
        read_config(tmp_path)
    assert caught.value.code == code
    assert str(tmp_path) in str(caught.value)
    assert "; fix: " in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(MixtralError, match="not a regular file") as caught:
        read_config(tmp_path)
    assert caught.value.code == BAD_DATA


def test_errors_name_the_file_that_was_read(tmp_path):
    native = {"dim": 64, "n_layers": 2, "hidden_dim": 96, "n_heads": 4, "vocab_size": -1}
    (tmp_path / "params.json").write_text(
        json.dumps(native | {"num_experts": 2, "num_experts_per_tok": 1})
    )
    with pytest.raises(MixtralError, match=r"params\.json field") as caught:
        read_config(tmp_path)
    assert "config.json" not in str(caught.value)
    for name, value in (("head_dim", 127), ("vocab_size", 0)):
        line = str(refusal(PUBLISHED_8X7B | {name: value}, source="some/config.json"))
        assert line.startswith(f"some/config.json field {name}: expected ")


def test_a_file_in_place_of_a_folder_is_not_found(tmp_path):
    (tmp_path / "weights").write_text("")
    with pytest.raises(MixtralError) as caught:
        read_config(tmp_path / "weights")
    assert caught.value.code == INPUT_NOT_FOUND


def test_scaled_rope_is_refused_wherever_it_stands():
    """Transformers lets a rope_scaling win over the rope_parameters beside it."""
    both = PUBLISHED_8X7B | {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    assert config_from_dict(both | {"rope_scaling": {"type": "default"}})
    for scaling in ({"type": "yarn", "factor": 4.0}, {"rope_type": "default", "type": "linear"}):
        assert "rope_scaling.type" in str(refusal(both | {"rope_scaling": scaling}))
    assert "a JSON object" in str(refusal(both | {"rope_scaling": [1]}))
    elsewhere = {"rope_scaling": {"type": "default", "rope_theta": 1e4}}
    assert "rope_scaling.rope_theta" in str(refusal(both | elsewhere))


def test_unknown_keys_of_rope_are_told():
    notes: list[str] = []
    rope = {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.5}
    config_from_dict(PUBLISHED_8X7B | {"rope_parameters": rope}, note=notes.append)
    assert notes == ["config.json: not used in rope_parameters: 'partial_rotary_factor'"]


def test_two_values_of_rope_theta_are_refused():
    raw = PUBLISHED_8X7B | {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 1e4}}
    with pytest.raises(MixtralError, match="rope_theta"):
        config_from_dict(raw)


def test_how_weights_are_quantized_is_for_those_who_read_them():
    notes: list[str] = []
    quantized = PUBLISHED_8X7B | {"quantization_config": {"quant_method": "gptq"}}
    assert config_from_dict(quantized, note=notes.append) == config_from_dict(PUBLISHED_8X7B)
    assert notes == []


def test_unknown_keys_are_told_once():
    notes: list[str] = []
    config_from_dict(PUBLISHED_8X7B, note=notes.append)
    assert notes == []
    raw = PUBLISHED_8X7B | {"norm_topk_prob": False, "partial_rotary_factor": 0.5}
    config_from_dict(raw, note=notes.append)
    assert notes == ["config.json: not used: 'norm_topk_prob', 'partial_rotary_factor'"]
