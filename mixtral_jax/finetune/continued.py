"""Factors to go on training from, out of a PEFT folder."""

from __future__ import annotations

import math

from mixtral_jax.convert.adapter import Adapter, Factors
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.finetune.lora import Pair, scale_of, target_paths
from mixtral_jax.finetune.options import TrainOptions

_FIX = "give --lora-r, --lora-alpha, --lora-target-modules and --use-rslora as it was trained with"


def first_factors(adapter: Adapter, options: TrainOptions) -> dict[str, Pair]:
    """The factors of an adapter as what trains, f32 on the host, by leaf path.

    Raises:
        MixtralError: exit code 65 for an adapter of another rank, scale or targets.
    """
    scale = scale_of(options.lora_r, options.lora_alpha, is_stabilized=options.use_rslora)
    paths = target_paths(adapter.config, options.lora_target_modules)
    found: dict[str, Pair] = {}
    with adapter.open() as factors:
        for path in adapter.parts:
            read = _own_part(path, factors(path), options.lora_r)
            if path in paths:
                _check(adapter, path, read, options.lora_r, scale)
                is_stack = ".experts." in path
                found[path] = Pair(*(x if is_stack else x[0] for x in (read.a, read.b)))
            elif read.b.any():
                raise _refused(adapter, path, "no target", "factors")
    for path in paths:
        if path not in found:
            raise _refused(adapter, path, "factors, as it is a target", "none")
    return found


def _own_part(path: str, factors: Factors, rank: int) -> Factors:
    """Without the zeros where factors of gate and up were joined (peft_folder.py): gate has the
    first half of the ranks, up the second."""
    a, b, scale = factors
    own, other = slice(rank), slice(rank, None)
    if path.endswith(".up"):
        own, other = slice(rank, None), slice(rank)
    if path.endswith((".gate", ".up")) and a.shape[1] == 2 * rank and not b[..., other].any():
        return Factors(a[:, own], b[..., own], scale)
    return factors


def _check(adapter: Adapter, path: str, factors: Factors, rank: int, scale: float) -> None:
    got = factors.a.shape[1]
    if got != rank or not math.isclose(factors.scale, scale, rel_tol=1e-6):
        wanted, found = f"rank {rank}, scale {scale:g}", f"rank {got}, scale {factors.scale:g}"
        raise _refused(adapter, path, wanted, found)


def _refused(adapter: Adapter, path: str, expected: str, got: str) -> MixtralError:
    what = f"--adapter {adapter.folder}: {path}"
    return MixtralError(what, expected=expected, got=got, fix=_FIX, code=BAD_DATA)
