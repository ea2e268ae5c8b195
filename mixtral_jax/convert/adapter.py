"""Reads a PEFT LoRA folder and puts it on top of loaded weights; merge.py adds it to them.

Two styles of expert adapters exist. One pair of factors per expert (transformers 4) lies beside the
names of the ``original`` layout. One pair for all experts (transformers 5) lies on the module
``mlp.experts``, nested where both of its parameters are adapted: A ``[E * r, in]`` has the experts
outermost, B ``[out, r * E]`` has them innermost (ParamWrapper of peft, tuners/lora/layer.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import NamedSharding

from mixtral_jax.config import ModelConfig
from mixtral_jax.convert import names
from mixtral_jax.convert.adapter_config import LoraConfig
from mixtral_jax.convert.base_identity import check_base
from mixtral_jax.convert.finite import all_finite
from mixtral_jax.convert.manifest import file_sha256
from mixtral_jax.convert.reader import PICKLES, Checkpoint, safe_path
from mixtral_jax.convert.safetensors_file import FLOATS, Tensor
from mixtral_jax.errors import BAD_DATA, INPUT_NOT_FOUND, MixtralError, listing
from mixtral_jax.model.transformer import LeafSpec, leaf_specs
from mixtral_jax.sharding.rules import kind_specs
from mixtral_jax.weights import Adapted, ExpertSlots, Matrix, Weight

CONFIG_NAME, TENSORS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Modules outside the layers.
ENDS = tuple(
    names.row_of("original", leaf).tensor.removesuffix(".weight").rpartition(".")[2]
    for leaf in ("lm_head", "embed_tokens")
)


class Pair(NamedTuple):
    """The two tensors of one adapted module: delta = scale * B A."""

    a: str
    b: str
    scale: float


class Part(NamedTuple):
    """Where the factors of one chunk lie: rows of B, and the expert where a pair holds them all."""

    pair: Pair
    expert: int | None
    rows: slice


class Factors(NamedTuple):
    """A ``[..., R, I]`` and B ``[..., O, R]`` of one leaf."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def _open(folder: Path) -> Checkpoint:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not (folder / TENSORS_NAME).exists() and pickles:
        raise MixtralError(
            f"{folder / pickles[0]} is a pickle, which can run code when read, and is refused",
            fix=f"resave it with peft's save_pretrained, which writes {TENSORS_NAME}",
            code=BAD_DATA,
        )
    return Checkpoint(folder, file=TENSORS_NAME)


class Adapter:
    """A PEFT LoRA folder that was proved to fit a model; its data is read by ``attach``.

    Args:
        folder: holds adapter_config.json and adapter_model.safetensors.
        config: of the base model.
        base: its folder, which an adapter of ours knows again.

    Raises:
        MixtralError: exit code 66 without the folder or its files; 65 for an adapter that is not
            plain LoRA, or tensors that do not fit the base (all are listed).
    """

    def __init__(self, folder: str | Path, config: ModelConfig, base: Path | None = None):
        self.folder, self.config = Path(folder), config
        if not self.folder.is_dir():
            raise MixtralError(
                f"adapter {folder}",
                expected="a folder that peft's save_pretrained wrote",
                got="no such folder",
                fix="check the path of the adapter",
                code=INPUT_NOT_FOUND,
            )
        lora = LoraConfig(safe_path(self.folder, CONFIG_NAME))
        with _open(self.folder) as checkpoint:
            self._sampled = checkpoint.fingerprint[TENSORS_NAME]
            if base is not None:
                check_base(str(self.folder), checkpoint.metadata, base)
            plan = _Plan(checkpoint.tensors, lora, leaf_specs(config))
            self.parts = plan.parts(self.folder)
            # All of it: adapters are small, and two of one training differ anywhere.
            digest = file_sha256(self.folder / TENSORS_NAME)
            checkpoint.check_unchanged()
        self.fingerprint = {TENSORS_NAME: digest, CONFIG_NAME: lora.digest}
        unknown = ", ".join(repr(name) for name in plan.unknown_targets())
        notes = []
        if unknown:
            notes.append(f"this model has no {unknown}, which its {CONFIG_NAME} names")
        if lora.other_base:
            notes.append(f"trained on {lora.other_base!r}, as its {CONFIG_NAME} says")
        self.notes = tuple(f"{self.folder}: {line}" for line in notes)

    def attach(
        self, leaves: Mapping[str, Weight], sharding_of: Callable[[str], NamedSharding]
    ) -> dict[str, Weight]:
        """Returns the leaves with those that the adapter knows as ``Adapted``.

        Args:
            leaves: loaded weights by path: arrays, or ``ExpertSlots``.
            sharding_of: as for ``load_weights``; the factors lie along the base.
        """
        found = dict(leaves)
        with self.open() as factors:
            for leaf in self.parts:
                found[leaf] = _adapted(leaves[leaf], factors(leaf), sharding_of(leaf))
        return found

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[str], Factors]]:
        """Opens the tensors again; gives a function from the path of an adapted leaf to factors.

        Raises:
            MixtralError: exit code 65 if they changed meanwhile, or are NaN or infinite.
        """
        with _open(self.folder) as checkpoint:
            if checkpoint.fingerprint[TENSORS_NAME] != self._sampled:
                what = f"{self.folder}: {TENSORS_NAME} changed while the model was loaded"
                raise MixtralError(what, fix="load again", code=BAD_DATA)
            read = functools.lru_cache(maxsize=2)(functools.partial(_read, checkpoint))
            yield lambda leaf: _factors(self.parts[leaf], read)


def _read(checkpoint: Checkpoint, name: str) -> np.ndarray:
    tensor = checkpoint.tensors[name]
    out = np.empty(tensor.shape, FLOATS[tensor.dtype])
    checkpoint.read_rows(name, 0, tensor.shape[0], out)
    checkpoint.check_unchanged()
    if not all_finite(out):
        raise MixtralError(
            f"{checkpoint.folder / TENSORS_NAME}: {name} has NaN or infinite values",
            fix="train the adapter again",
            code=BAD_DATA,
        )
    return out.astype(np.float32)


class _Plan:
    """Accounts for every tensor of the adapter: each belongs to one module, whose shape it fits."""

    def __init__(
        self, tensors: Mapping[str, Tensor], lora: LoraConfig, specs: Mapping[str, LeafSpec]
    ):
        self.tensors, self.lora = tensors, lora
        # Adapters of attention alone look the same in both.
        marker = names.moe_marker("fused")
        is_fused = any(marker in f".{name}." for name in (*tensors, *lora.parameter_targets))
        self.layout = "fused" if is_fused else "original"
        # The matrices inside layers. An embedding or a head is no matrix product that adapts.
        self.specs = {
            leaf: spec
            for leaf, spec in specs.items()
            if leaf.startswith("layers.") and len(spec.shape) > 1
        }
        self.problems: list[str] = []
        self.used: set[str] = set()

    def parts(self, source: Path) -> dict[str, list[Part | None]]:
        """The parts of every adapted leaf: one per expert, or one."""
        pieces = list(names.pieces(self.layout, self.specs))
        modules = {piece.rows.tensor: piece.tensor_shape for piece in pieces}
        pairs = dict(self._pairs(modules))
        self.problems += [f"extra {name}" for name in self.tensors.keys() - self.used]
        self.problems += [
            f"{name}: expected dtype {' or '.join(FLOATS)}, got {tensor.dtype}"
            for name, tensor in self.tensors.items()
            if tensor.dtype not in FLOATS
        ]
        self._check_ends()
        if not self.tensors:
            self.problems.append("no tensors")
        if self.problems:
            raise MixtralError(
                f"{source}: {len(self.problems)} problem(s) with the adapter's tensors: "
                f"{listing(self.problems)}",
                fix="use the base model that the adapter was trained on, and adapt only its "
                "attention, experts and router",
                code=BAD_DATA,
            )
        found: dict[str, list[Part | None]] = {}
        for piece in pieces:
            pair, shape = pairs.get(piece.rows.tensor), piece.tensor_shape
            start, expert = piece.rows.start % shape[-2], piece.chunk.expert
            rows = slice(start, start + piece.rows.stop - piece.rows.start)
            stacked = expert if len(shape) == 3 else None
            part = None if pair is None else Part(pair, stacked, rows)
            found.setdefault(piece.chunk.leaf, []).append(part)
        # Proves the accounting itself: what was checked off is what will be read.
        read = {
            name for parts in found.values() for part in parts if part for name in part.pair[:2]
        }
        assert read == self.used == self.tensors.keys()
        return {leaf: parts for leaf, parts in found.items() if any(parts)}

    def unknown_targets(self) -> list[str]:
        """Names of the configuration that nothing in this model ends with, in any layout."""
        known = [f".{end}" for end in ENDS]
        for layout in ("original", "fused"):
            for piece in names.pieces(layout, self.specs):
                known += [f".{piece.rows.tensor}", f".{piece.rows.tensor}".removesuffix(".weight")]
        return [
            target
            for target in (*self.lora.module_targets, *self.lora.parameter_targets)
            if not any(name.endswith(f".{target}") for name in known)
        ]

    def _check_ends(self) -> None:
        """An embedding or a head that is named must have tensors (which then are refused)."""
        for end in ENDS:
            has_tensors = any(f".{end}." in name for name in self.tensors)
            if self.lora.targets(end, is_parameter=False) and not has_tensors:
                self._missing(end)

    def _pairs(self, modules: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Pair]]:
        stacked: dict[str, list[str]] = {}
        for tensor, shape in modules.items():
            module = tensor.removesuffix(".weight")
            if len(shape) == 3:
                stacked.setdefault(tensor.rpartition(".")[0], []).append(tensor)
                continue
            # In transformers 5 the router is a parameter, which peft calls by its full name.
            is_parameter = self.layout == "fused" and names.moe_marker("fused") in tensor
            key = tensor if is_parameter else module
            if pair := self._names(module):
                yield tensor, self._checked(pair, key, shape, 1)
            elif self.lora.targets(key, is_parameter=is_parameter):
                self._missing(key)
        for module, parameters in stacked.items():
            yield from self._nested(module, parameters, modules)

    def _nested(
        self, module: str, parameters: list[str], modules: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Pair]]:
        """Which wrapper adapts which parameter depends on peft's nesting: the shapes tell."""
        free = list(parameters)
        for stem in (f"{module}.base_layer", module):
            if not (pair := self._names(stem)):
                continue
            a, b = (self.tensors[name].shape for name in pair)
            fits = [p for p in free if (b[:1], a[-1:]) == (modules[p][1:2], modules[p][2:])]
            if not fits:
                wanted = " or ".join(str(list(modules[p])) for p in free)
                self.problems.append(
                    f"{pair[0]} and {pair[1]}: expected factors of {wanted or 'nothing more'}, "
                    f"got {list(a)} and {list(b)}"
                )
                continue
            free.remove(fits[0])
            num_experts, *shape = modules[fits[0]]
            yield fits[0], self._checked(pair, fits[0], tuple(shape), num_experts)
        for parameter in free:
            if self.lora.targets(parameter, is_parameter=True):
                self._missing(parameter)

    def _missing(self, target: str) -> None:
        self.problems.append(f"no tensors for {target}, which {self.lora.path.name} names")

    def _names(self, stem: str) -> tuple[str, str] | None:
        """The two tensors of a module, if both are there; one alone is a problem."""
        a, b = (f"{PREFIX}{stem}.lora_{letter}.weight" for letter in "AB")
        present = [name for name in (a, b) if name in self.tensors]
        self.used.update(present)
        if len(present) == 1:
            self.problems.append(f"missing {b if present[0] == a else a}")
        return (a, b) if len(present) == 2 else None

    def _checked(
        self, pair: tuple[str, str], key: str, shape: tuple[int, ...], num_experts: int
    ) -> Pair:
        rank = self.lora.rank(key) * num_experts
        for name, wanted in zip(pair, ((rank, shape[1]), (shape[0], rank)), strict=True):
            got = self.tensors[name].shape
            if got != wanted:
                self.problems.append(f"{name}: expected shape {list(wanted)}, got {list(got)}")
        return Pair(*pair, self.lora.scale(key))


def _factors(parts: list[Part | None], read: Callable[[str], np.ndarray]) -> Factors:
    """Reads the factors of a leaf, f32.

    An expert without an adapter among experts that have one gets zeros, and so do the ranks that
    an expert lacks beside one of higher rank: zeros add exactly nothing.
    """
    found = [None if part is None else _factor(part, read, len(parts)) for part in parts]
    present = [factor for factor in found if factor is not None]
    rank = max(factor.a.shape[0] for factor in present)
    first = present[0]
    a = np.zeros((len(parts), rank, first.a.shape[1]), np.float32)
    b = np.zeros((len(parts), first.b.shape[0], rank), np.float32)
    scales = {factor.scale for factor in present}
    scale = scales.pop() if len(scales) == 1 else 1.0  # one per leaf: unequal ones go into B
    for e, factor in enumerate(found):
        if factor is not None:
            own = factor.a.shape[0]
            a[e, :own] = factor.a
            b[e, :, :own] = factor.b if factor.scale == scale else factor.b * factor.scale
    # A matrix that is not one of a stack of experts has one part.
    return Factors(a, b, scale)


def _factor(part: Part, read: Callable[[str], np.ndarray], num_experts: int) -> Factors:
    a, b = read(part.pair.a), read(part.pair.b)
    if part.expert is not None:
        a = a.reshape(num_experts, -1, a.shape[-1])[part.expert]
        b = b.reshape(b.shape[0], -1, num_experts)[:, :, part.expert]
    return Factors(a, b[part.rows], part.pair.scale)


def _adapted(base: Weight, factors: Factors, sharding: NamedSharding) -> Weight:
    if isinstance(base, ExpertSlots):
        num_slots = len(base.slots)
        slots = []
        for i, slot in enumerate(base.slots):
            own = Factors(factors.a[i::num_slots], factors.b[i::num_slots], factors.scale)
            slots.append(_adapted(slot, own, sharding))
        return ExpertSlots(tuple(slots))
    a, b = factors.a, factors.b
    if base.ndim == 2:
        a, b = a[0], b[0]
    adapted = Adapted(cast(Matrix, base), a, b, factors.scale)
    specs, kind = kind_specs(adapted, sharding.spec), sharding.memory_kind

    def place(array: np.ndarray, spec: Any) -> jax.Array:
        placed = NamedSharding(sharding.mesh, spec, memory_kind=kind)
        with np.errstate(over="ignore", invalid="ignore"):
            cast_array = np.ascontiguousarray(array.astype(base.dtype))
        return jax.make_array_from_callback(array.shape, placed, lambda index: cast_array[index])

    return Adapted(adapted.base, place(a, specs.a), place(b, specs.b), factors.scale)
