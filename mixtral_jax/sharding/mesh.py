"""MeshSpec: how many devices on each of the axes data, expert and tensor."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh

from mixtral_jax.config import ModelConfig
from mixtral_jax.errors import BAD_CONFIG, USAGE, MixtralError
from mixtral_jax.sharding import hosts

AXES = ("data", "expert", "tensor")

_FORMS = "DATAxEXPERT (1x8), DATAxEXPERTxTENSOR (2x4x2) or names (data=2,expert=4)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Devices per mesh axis.

    Rows of the batch lie over ``data``, experts over ``expert``, parts of matrices over ``tensor``.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1

    def __post_init__(self):
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise MixtralError(
                    f"mesh axis {axis}",
                    expected="at least 1",
                    got=getattr(self, axis),
                    fix=f"{axis}=1 leaves it unused",
                    code=USAGE,
                )

    def __str__(self):
        sizes = (self.data, self.expert) if self.tensor == 1 else self.shape
        return "x".join(map(str, sizes))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Sizes in the order of ``AXES``."""
        return (self.data, self.expert, self.tensor)

    @property
    def num_devices(self) -> int:
        """Devices that the mesh needs."""
        return self.data * self.expert * self.tensor

    def group(self, *axes: str) -> tuple[int, int]:
        """Devices along these axes together, and devices from their first to their last.

        Numbered along tensor first, then expert, then data, as ``build`` lays them out.
        """
        steps = {"data": self.expert * self.tensor, "expert": self.tensor, "tensor": 1}
        sizes = {axis: getattr(self, axis) for axis in axes}
        span = 1 + sum((size - 1) * steps[axis] for axis, size in sizes.items())
        return math.prod(sizes.values()), span

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """Reads ``1x8``, ``2x4x2`` or ``data=2,expert=4``.

        Raises:
            MixtralError: exit code 64 for any other text.
        """
        text = text.strip().lower()
        if re.fullmatch(r"[0-9]{1,6}x[0-9]{1,6}(x[0-9]{1,6})?", text):
            return cls(**dict(zip(AXES, map(int, text.split("x")), strict=False)))
        named = re.fullmatch(r"[a-z]+=[0-9]{1,6}(,[a-z]+=[0-9]{1,6})*", text)
        pairs = [part.split("=") for part in text.split(",")] if named else []
        names = [name for name, _ in pairs]
        if not pairs or set(names) - set(AXES) or len(set(names)) < len(names):
            fix = f"--mesh 1x{text}" if re.fullmatch(r"[1-9][0-9]{0,5}", text) else "--mesh 1x8"
            raise MixtralError("--mesh", expected=_FORMS, got=repr(text), fix=fix, code=USAGE)
        return cls(**{name: int(size) for name, size in pairs})

    def fit(self, config: ModelConfig) -> MeshSpec:
        """The mesh for this model: experts are split inside where the axis outnumbers them.

        Returns:
            This mesh if E is a multiple of its expert axis; expert E x tensor (axis / E) where the
            axis is a multiple of E instead.

        Raises:
            MixtralError: exit code 78 if neither holds, or a split dim does not divide.
        """
        E = config.num_local_experts
        spec = self
        if E % self.expert:
            if self.expert % E:
                raise MixtralError(
                    f"mesh {self}",
                    expected=f"an expert axis that divides {E} experts or is a multiple of {E}",
                    got=self.expert,
                    fix=f"--mesh {self.data}x{E}",
                    code=BAD_CONFIG,
                )
            tensor = self.tensor * self.expert // E
            spec = MeshSpec(data=self.data, expert=E, tensor=tensor)
        for name, size in (
            ("num_key_value_heads", config.num_key_value_heads),
            ("intermediate_size", config.intermediate_size),
            ("vocab_size", config.vocab_size),
        ):
            if size % spec.tensor:
                inside = "" if spec == self else f", which splits {E} experts inside as {spec}"
                axis = "tensor" if self.tensor > 1 else "expert"
                raise MixtralError(
                    f"mesh {self}{inside}",
                    expected=f"a tensor axis that divides {name} {size}",
                    got=spec.tensor,
                    fix=f"make the {axis} axis smaller",
                    code=BAD_CONFIG,
                )
        return spec

    def build(self) -> Mesh:
        """A mesh over the first devices of the default backend.

        Raises:
            MixtralError: exit code 78 if there are too few devices.
        """
        devices = jax.devices()
        hosts.check_devices(self.num_devices, str(self))
        if len(devices) < self.num_devices:
            kind = devices[0].platform
            simulate = "JAX_PLATFORMS=cpu to simulate it"
            if kind == "cpu":  # the backend has started with fewer
                flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={self.num_devices}"
                simulate = f"load this mesh before JAX is used, or set {flag}"
            raise MixtralError(
                f"mesh {self}",
                expected=f"{self.num_devices} devices",
                got=f"{len(devices)} ({kind})",
                fix=f"choose a mesh of {len(devices)}, or {simulate}",
                code=BAD_CONFIG,
            )
        # Auto: the compiler places attention; only the experts are placed by hand (dispatch.py).
        return jax.make_mesh(
            self.shape, AXES, (AxisType.Auto,) * 3, devices=devices[: self.num_devices]
        )


def simulate_on_cpu(spec: MeshSpec, note: Callable[[str], None]) -> None:
    """Gives a machine without accelerator as many CPU devices as the mesh needs.

    Call it before JAX starts its backend; afterwards it changes nothing. Accelerators, where there
    are any, are used as they are.

    Args:
        spec: the mesh wanted.
        note: called with one line if the mesh is simulated.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            each = -(-spec.num_devices // hosts.num_processes())
            jax.config.update("jax_num_cpu_devices", each)
        except RuntimeError:
            return  # the backend has started; build() says if its devices are too few
    if spec.num_devices > 1 and jax.default_backend() == "cpu":
        note(f"no accelerator: simulating the {spec} mesh with {spec.num_devices} CPU devices")


def fitted_spec(
    asked: MeshSpec | None, config: ModelConfig, note: Callable[[str], None]
) -> MeshSpec:
    """The mesh that was asked for, fitted to the model and simulated where need be, or the default.

    Raises:
        MixtralError: as ``MeshSpec.fit`` and ``simulate_on_cpu``.
    """
    if asked is None:
        return default_spec(config, note)
    spec = asked.fit(config)
    simulate_on_cpu(spec, note)
    return spec


def default_spec(config: ModelConfig, note: Callable[[str], None]) -> MeshSpec:
    """All accelerators on the expert axis, else one device.

    Where their number does not fit the model the most that fit are taken, and ``note`` is told.
    """
    if jax.default_backend() == "cpu" and hosts.num_processes() == 1:
        return MeshSpec()
    count = len(jax.devices())
    for size in range(count, 0, -1):
        try:
            spec = MeshSpec(expert=size).fit(config)
        except MixtralError:
            continue
        if size < count:
            note(f"{count} devices do not fit this model: using {size}, the mesh {spec}")
        return spec
    return MeshSpec()
