"""The names of weights: one table between published tensors and canonical leaves, read both ways.

``original`` is what every published Mixtral has on disk; ``fused`` is the in-memory layout of
transformers 5, on disk with ``save_pretrained(save_original_format=False)``. The layout is told
by the keys of the file, never by the name of the model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.convert.reader import FLOATS, Tensor
from mixtral_jax.errors import BAD_DATA, MixtralError
from mixtral_jax.model.transformer import LeafSpec


class Row(NamedTuple):
    """One row of the table.

    ``{i}`` is the layer, ``{e}`` the expert (one tensor per expert; without it, experts are
    stacked as in the leaf). ``part`` (k, n) says that the tensor holds n leaves, joined along the
    outputs of each expert, and this leaf is the k-th.
    """

    tensor: str
    leaf: str
    part: tuple[int, int] = (0, 1)


_LAYER, _MOE = "model.layers.{i}.", "model.layers.{i}.block_sparse_moe."
_COMMON = (
    Row("model.embed_tokens.weight", "embed_tokens"),
    Row(_LAYER + "input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    Row(_LAYER + "self_attn.q_proj.weight", "layers.{i}.attention.q_proj"),
    Row(_LAYER + "self_attn.k_proj.weight", "layers.{i}.attention.k_proj"),
    Row(_LAYER + "self_attn.v_proj.weight", "layers.{i}.attention.v_proj"),
    Row(_LAYER + "self_attn.o_proj.weight", "layers.{i}.attention.o_proj"),
    Row(_LAYER + "post_attention_layernorm.weight", "layers.{i}.moe_norm.weight"),
    Row("model.norm.weight", "norm.weight"),
    Row("lm_head.weight", "lm_head"),
)
LAYOUTS: dict[str, tuple[Row, ...]] = {
    "original": (
        *_COMMON,
        Row(_MOE + "gate.weight", "layers.{i}.moe.router.weight"),
        Row(_MOE + "experts.{e}.w1.weight", "layers.{i}.moe.experts.gate"),
        Row(_MOE + "experts.{e}.w3.weight", "layers.{i}.moe.experts.up"),
        Row(_MOE + "experts.{e}.w2.weight", "layers.{i}.moe.experts.down"),
    ),
    "fused": (
        *_COMMON,
        Row(_LAYER + "mlp.gate.weight", "layers.{i}.moe.router.weight"),
        Row(_LAYER + "mlp.experts.gate_up_proj", "layers.{i}.moe.experts.gate", (0, 2)),
        Row(_LAYER + "mlp.experts.gate_up_proj", "layers.{i}.moe.experts.up", (1, 2)),
        Row(_LAYER + "mlp.experts.down_proj", "layers.{i}.moe.experts.down"),
    ),
}

# Buffers of old checkpoints that are recomputed, not weights.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERT_LEAF = re.compile(r"layers\.\d+\.moe\.experts\.(gate|up|down)")


class Chunk(NamedTuple):
    """The unit of reading and of digests: one expert of an expert leaf, or a whole other leaf."""

    leaf: str
    expert: int | None


class Rows(NamedTuple):
    """Rows ``[start, stop)`` of a tensor whose dims but the last are flattened."""

    tensor: str
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Where each chunk comes from.

    Attributes:
        layout: a key of ``LAYOUTS``.
        sources: one entry per chunk of every leaf.
        ignored: tensors that are known not to be weights.
        tied_head: True where the file repeats the embedding as a head.
    """

    layout: str
    sources: Mapping[Chunk, Rows]
    ignored: tuple[str, ...]
    tied_head: bool


def chunks_of(leaf: str, shape: tuple[int, ...]) -> list[Chunk]:
    """The chunks of a leaf, in order."""
    if EXPERT_LEAF.fullmatch(leaf):
        return [Chunk(leaf, e) for e in range(shape[0])]
    return [Chunk(leaf, None)]


class Piece(NamedTuple):
    """A chunk as the table has it: its rows, and the shape its whole tensor must have."""

    chunk: Chunk
    rows: Rows
    tensor_shape: tuple[int, ...]


def pieces(layout: str, specs: Mapping[str, LeafSpec]) -> Iterator[Piece]:
    """Reads the table from leaves to tensors: every chunk of every leaf with its place."""
    table = {row.leaf: row for row in LAYOUTS[layout]}
    for leaf, spec in specs.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.*)", leaf)
        row = table[f"layers.{{i}}.{layer[2]}" if layer else leaf]
        i = layer[1] if layer else ""
        k, n = row.part
        for chunk in chunks_of(leaf, spec.shape):
            shape = spec.shape if chunk.expert is None else spec.shape[1:]
            num_rows = shape[0]
            if chunk.expert is None or "{e}" in row.tensor:
                start, tensor_shape = 0, shape
            else:
                start = (chunk.expert * n + k) * num_rows
                tensor_shape = (spec.shape[0], num_rows * n, *shape[1:])
            name = row.tensor.format(i=i, e=chunk.expert)
            yield Piece(chunk, Rows(name, start, start + num_rows), tensor_shape)


def plan(
    tensors: Mapping[str, Tensor],
    specs: Mapping[str, LeafSpec],
    *,
    source: str | Path,
    problems: list[str] | None = None,
) -> Plan:
    """Accounts for every tensor and every leaf exactly once.

    Args:
        tensors: what the files hold.
        specs: what the model needs.
        source: the checkpoint's name, for the error line.
        problems: what was already found wrong; reported together with what is found here.

    Raises:
        MixtralError: exit code 65, listing all that is missing, extra, misshapen or mistyped.
    """
    layout = detect_layout(tensors)
    wanted = list(pieces(layout, specs))
    shapes = {piece.rows.tensor: piece.tensor_shape for piece in wanted}
    ignored = tuple(name for name in tensors if IGNORED.fullmatch(name))
    tied_head = "lm_head" not in specs and HEAD in tensors
    if tied_head:
        shapes[HEAD] = shapes[EMBEDDING]
    found = [*(problems or ())]
    found += [f"missing {name}" for name in shapes if name not in tensors]
    found += [f"extra {name}" for name in tensors.keys() - shapes.keys() - set(ignored)]
    for name in shapes.keys() & tensors.keys():
        tensor = tensors[name]
        if tensor.shape != tuple(shapes[name]):
            found.append(f"{name}: expected shape {list(shapes[name])}, got {list(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            found.append(f"{name}: expected dtype {' or '.join(FLOATS)}, got {tensor.dtype}")
    found += _mixed(wanted, tensors)
    _exactly_once(wanted, specs)
    if found:
        raise MixtralError(
            f"{source}: {len(found)} problem(s) with its tensors: {'; '.join(sorted(found))}",
            fix="use the config.json and every file that were published together",
            code=BAD_DATA,
        )
    sources = {piece.chunk: piece.rows for piece in wanted}
    return Plan(layout=layout, sources=sources, ignored=ignored, tied_head=tied_head)


def detect_layout(tensors: Mapping[str, Any]) -> str:
    """A key of ``LAYOUTS``, by the names of a file."""
    fused = sum(".mlp." in name for name in tensors)
    original = sum(".block_sparse_moe." in name for name in tensors)
    return "fused" if fused > original else "original"


def _mixed(wanted: list[Piece], tensors: Mapping[str, Tensor]) -> list[str]:
    dtypes: dict[str, set[str]] = {}
    for piece in wanted:
        if piece.rows.tensor in tensors:
            dtypes.setdefault(piece.chunk.leaf, set()).add(tensors[piece.rows.tensor].dtype)
    return [
        f"{leaf}: expected one dtype for all experts, got {' and '.join(sorted(found))}"
        for leaf, found in dtypes.items()
        if len(found) > 1
    ]


def _exactly_once(wanted: list[Piece], specs: Mapping[str, LeafSpec]) -> None:
    """Proves the table itself: each row of each tensor feeds one chunk, each chunk is fed once."""
    assert len({piece.chunk for piece in wanted}) == len(wanted)
    assert {piece.chunk.leaf for piece in wanted} == set(specs)
    ends: dict[str, int] = {}
    for piece in sorted(wanted, key=lambda piece: piece.rows):
        assert piece.rows.start == ends.get(piece.rows.tensor, 0), piece
        ends[piece.rows.tensor] = piece.rows.stop
    shapes = {piece.rows.tensor: piece.tensor_shape for piece in wanted}
    for tensor, shape in shapes.items():
        assert ends[tensor] == math.prod(shape[:-1] or shape), tensor
