"""Rows of the table by the names that jax gives to devices."""

from __future__ import annotations

from mixtral_jax.plan import devices
from mixtral_jax.plan.devices import DEVICES, device_of_kind


def test_devices_are_found_by_what_jax_calls_them():
    assert device_of_kind("NVIDIA H100 80GB HBM3") == DEVICES["h100"]
    assert device_of_kind("TPU v5 lite") == DEVICES["v5e"]
    assert device_of_kind("cpu") is None
    assert set(devices._KINDS.values()) <= set(DEVICES)
