"""Accelerators as their makers' data sheets have them; nothing here was measured."""

from __future__ import annotations

from typing import NamedTuple

from mixtral_jax.errors import USAGE, MixtralError


class Device(NamedTuple):
    """One accelerator.

    Attributes:
        memory_bytes: of its own.
        flops: dense bf16 products per second, accumulated in f32, without sparsity.
        memory_bandwidth: bytes read per second.
        link_bandwidth: bytes that it sends per second to devices of its domain.
        domain: devices joined by those links: the GPUs of a host, the chips of a TPU pod.
        network_bandwidth: bytes that it sends per second out of its domain.
        host_bandwidth: bytes per second that it can read of its host's memory; None where the data
            sheet does not say.
    """

    memory_bytes: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    domain: int
    network_bandwidth: float
    host_bandwidth: float | None = None


_GB = 10**9
# GPUs: hosts of eight. H100/H200 SXM with NVLink 4 (900 GB/s both ways) and 400 Gb/s of network
# each, A100 SXM with NVLink 3 (600 GB/s both ways) and 200 Gb/s each; L40S: PCIe 4 x16 and
# 200 Gb/s each; RTX 4090: PCIe 4 x16 and 100 Gb/s shared by a host. TPUs: interchip bandwidth of
# the chip (1600, 4800, 3200 Gb/s, all links together) in a pod of 256 or 8,960, 200 or 400 Gb/s of
# network shared by a host's chips.
# To the host: PCIe 5 x16 (64 GB/s each way) or PCIe 4 x16 (32).
DEVICES: dict[str, Device] = {
    "h100": Device(80 * _GB, 989e12, 3.35e12, 450e9, 8, 50e9, 64e9),
    "h200": Device(141 * _GB, 989e12, 4.8e12, 450e9, 8, 50e9, 64e9),
    "a100-80g": Device(80 * _GB, 312e12, 2.039e12, 300e9, 8, 25e9, 32e9),
    "a100-40g": Device(40 * _GB, 312e12, 1.555e12, 300e9, 8, 25e9, 32e9),
    "l40s": Device(48 * _GB, 362.05e12, 0.864e12, 32e9, 8, 25e9, 32e9),
    "rtx-4090": Device(24 * _GB, 165.2e12, 1.008e12, 32e9, 8, 1.5625e9, 32e9),
    "v5e": Device(16 * _GB, 197e12, 0.819e12, 200e9, 256, 3.125e9),
    "v5p": Device(95 * _GB, 459e12, 2.765e12, 600e9, 8960, 6.25e9),
    "v6e": Device(32 * _GB, 918e12, 1.6e12, 400e9, 256, 12.5e9),
}


def find_device(name: str) -> Device:
    """A row of the table.

    Raises:
        MixtralError: exit code 64 for another name.
    """
    if name not in DEVICES:
        known, fix = ", ".join(DEVICES), "name the one that is most like yours"
        raise MixtralError("--device", expected=known, got=repr(name), fix=fix, code=USAGE)
    return DEVICES[name]


# What jax calls some of them (``Device.device_kind``).
_KINDS = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA L40S": "l40s",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}


def device_of_kind(kind: str) -> Device | None:
    """The row of the table for what jax calls ``kind``; None for others."""
    return DEVICES[_KINDS[kind]] if kind in _KINDS else None


def send_bandwidth(device: Device, span: int) -> float:
    """Bytes per second that a device sends in a collective whose groups reach so many devices."""
    return device.link_bandwidth if span <= device.domain else device.network_bandwidth
