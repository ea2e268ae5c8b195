"""The environment of commands that tests start."""

from __future__ import annotations

import importlib.metadata
import os

# jaxlib 0.12 has no older emitters, and ends a process that is given a flag it does not know.
EMITTERS = "xla_cpu_use_fusion_emitters"
HAS_OLDER_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
DEVICES_FLAG = "--xla_force_host_platform_device_count"


def without_devices() -> dict[str, str]:
    """This environment, less the devices that the tests simulate for themselves."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = " ".join(flag for flag in flags if not flag.startswith(DEVICES_FLAG))
    return os.environ | {"XLA_FLAGS": kept}
