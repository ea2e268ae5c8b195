"""MeshSpec: what can be written, what fits a model, and what is refused."""

from __future__ import annotations

import jax
import pytest

from mixtral_jax.errors import BAD_CONFIG, USAGE, MixtralError
from mixtral_jax.sharding.mesh import AXES, MeshSpec, default_spec


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("1x8", (1, 8, 1)),
        ("2x4x2", (2, 4, 2)),
        ("data=2,expert=4", (2, 4, 1)),
        ("tensor=2", (1, 1, 2)),
        (" 1X8 ", (1, 8, 1)),
    ],
)
def test_parses(text, shape):
    assert MeshSpec.parse(text).shape == shape


def test_prints_as_it_is_written():
    for text in ("1x8", "2x4x2"):
        assert str(MeshSpec.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "8", "1x", "1x8x2x2", "1x-8", "x=1", "data=2,data=2", "1x0", "0x8", "1.5x2"]
)
def test_refuses_other_texts(text):
    with pytest.raises(MixtralError) as caught:
        MeshSpec.parse(text)
    assert caught.value.code == USAGE


def test_more_devices_than_experts_split_inside_experts(small_config):
    config = small_config(num_local_experts=4)
    assert MeshSpec.parse("1x8").fit(config).shape == (1, 4, 2)
    assert MeshSpec.parse("2x4").fit(config).shape == (2, 4, 1)
    assert MeshSpec.parse("1x2").fit(config).shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("mesh", "fields"),
    [
        ("1x8", {"num_local_experts": 6}),
        ("1x3", {}),
        ("1x1x4", {}),  # two key/value heads
        ("1x1x2", {"vocab_size": 65}),
        ("1x1x2", {"intermediate_size": 65}),
    ],
)
def test_refuses_what_does_not_divide(small_config, mesh, fields):
    with pytest.raises(MixtralError) as caught:
        MeshSpec.parse(mesh).fit(small_config(**fields))
    assert caught.value.code == BAD_CONFIG
    assert "; fix: " in str(caught.value)


def test_builds_over_the_first_devices():
    mesh = MeshSpec.parse("2x2x2").build()
    assert mesh.axis_names == AXES
    assert mesh.devices.size == 8
    assert list(MeshSpec.parse("1x2").build().devices.flat) == jax.devices()[:2]


def test_too_few_devices_is_told():
    told = "expected 16 devices, got 8.*load this mesh before JAX is used"
    with pytest.raises(MixtralError, match=told) as caught:
        MeshSpec.parse("1x16").build()
    assert caught.value.code == BAD_CONFIG


def test_default_is_one_device_without_accelerator(small_config):
    assert default_spec(small_config(), pytest.fail) == MeshSpec()


@pytest.mark.parametrize(
    ("experts", "spec", "told"), [(8, "1x8", 0), (4, "1x4x2", 0), (6, "1x6", 1), (7, "1x7", 1)]
)
def test_default_is_all_accelerators_or_says_so(small_config, monkeypatch, experts, spec, told):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    notes: list[str] = []
    config = small_config(num_local_experts=experts)
    assert str(default_spec(config, notes.append)) == spec
    assert len(notes) == told
