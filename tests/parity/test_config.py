"""Our configuration and transformers' MixtralConfig read each other's files."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mixtral_jax.config import PRESETS, ModelConfig, config_from_dict, config_to_dict, read_config

pytestmark = pytest.mark.parity

RENAMED = {"eos_token_ids", "rope_theta", "dtype"}


def assert_same(ours: ModelConfig, theirs) -> None:
    for field in dataclasses.fields(ours):
        if field.name not in RENAMED:
            assert getattr(theirs, field.name) == getattr(ours, field.name), field.name
    assert theirs.rope_parameters == {"rope_theta": ours.rope_theta, "rope_type": "default"}
    assert str(theirs.dtype).removeprefix("torch.") == ours.dtype
    eos = theirs.eos_token_id
    assert (tuple(eos) if isinstance(eos, list) else (eos,)) == ours.eos_token_ids


@pytest.fixture(params=[*PRESETS, "unusual"])
def config(request, small_config):
    if request.param in PRESETS:
        return PRESETS[request.param]
    return small_config(
        sliding_window=16,
        tie_word_embeddings=True,
        head_dim=12,
        eos_token_ids=(2, 5),
        rms_norm_eps=1e-6,
        dtype="float16",
    )


def test_transformers_reads_ours(config, tmp_path, transformers):
    (tmp_path / "config.json").write_text(json.dumps(config_to_dict(config)))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.MixtralConfig
    assert_same(config, theirs)


def test_we_read_theirs(config, tmp_path, transformers):
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in RENAMED
    }
    theirs = transformers.MixtralConfig(
        **fields,
        rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        eos_token_id=list(config.eos_token_ids),
        dtype=config.dtype,
    )
    assert config_from_dict(theirs.to_dict()) == config
    theirs.save_pretrained(tmp_path)
    assert read_config(tmp_path) == config


def test_a_head_dim_that_transformers_leaves_out(transformers):
    theirs = transformers.MixtralConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2
    ).to_dict()
    assert theirs["head_dim"] is None
    assert config_from_dict(theirs).head_dim == 16
