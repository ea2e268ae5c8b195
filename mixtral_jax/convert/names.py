"""The names of weights: one table between published tensors and canonical leaves, read both ways.

``original`` is what every published Mixtral has on disk at Hugging Face; ``fused`` is the in-memory
layout of transformers 5, on disk with ``save_pretrained(save_original_format=False)``; ``unfused``
has those names with a tensor per expert and matrix, as GPTQModel writes them; ``native`` and
``native_stacked`` are Mistral's own files, of mistral-inference and of the first release. The
layout is told by the keys of the files, never by the name of the model. See docs/formats.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixtral_jax.convert.quantized.form import Method
from mixtral_jax.convert.quantized.modules import Module, gather
from mixtral_jax.convert.safetensors_file import FLOATS, Tensor
from mixtral_jax.convert.transforms import Transform
from mixtral_jax.errors import BAD_DATA, MixtralError, listing
from mixtral_jax.model.transformer import LeafSpec


class Row(NamedTuple):
    """One row of the table.

    ``{i}`` is the layer, ``{e}`` the expert (one tensor per expert; without it, experts are
    stacked as in the leaf). ``part`` (k, n) says that the tensor holds n leaves, joined along the
    outputs of each expert, and this leaf is the k-th. ``transform`` is how the published matrix
    differs from the canonical one (convert/transforms.py). ``flat``: a stack is published as one
    tall matrix.
    """

    tensor: str
    leaf: str
    part: tuple[int, int] = (0, 1)
    transform: Transform = "as_is"
    flat: bool = False


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
_NATIVE_LAYER, _NATIVE_MOE = "layers.{i}.", "layers.{i}.feed_forward."
_STACKED_MOE = "layers.{i}.block_sparse_moe."
_NATIVE_COMMON = (
    Row("tok_embeddings.weight", "embed_tokens"),
    Row(_NATIVE_LAYER + "attention_norm.weight", "layers.{i}.attention_norm.weight"),
    Row(_NATIVE_LAYER + "attention.wq.weight", "layers.{i}.attention.q_proj", transform="rope"),
    Row(_NATIVE_LAYER + "attention.wk.weight", "layers.{i}.attention.k_proj", transform="rope"),
    Row(_NATIVE_LAYER + "attention.wv.weight", "layers.{i}.attention.v_proj"),
    Row(_NATIVE_LAYER + "attention.wo.weight", "layers.{i}.attention.o_proj"),
    Row(_NATIVE_LAYER + "ffn_norm.weight", "layers.{i}.moe_norm.weight"),
    Row("norm.weight", "norm.weight"),
    Row("output.weight", "lm_head"),
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
    "unfused": (
        *_COMMON,
        Row(_LAYER + "mlp.gate.weight", "layers.{i}.moe.router.weight"),
        Row(_LAYER + "mlp.experts.{e}.gate_proj.weight", "layers.{i}.moe.experts.gate"),
        Row(_LAYER + "mlp.experts.{e}.up_proj.weight", "layers.{i}.moe.experts.up"),
        Row(_LAYER + "mlp.experts.{e}.down_proj.weight", "layers.{i}.moe.experts.down"),
    ),
    "native": (
        *_NATIVE_COMMON,
        Row(_NATIVE_MOE + "gate.weight", "layers.{i}.moe.router.weight"),
        Row(_NATIVE_MOE + "experts.{e}.w1.weight", "layers.{i}.moe.experts.gate"),
        Row(_NATIVE_MOE + "experts.{e}.w3.weight", "layers.{i}.moe.experts.up"),
        Row(_NATIVE_MOE + "experts.{e}.w2.weight", "layers.{i}.moe.experts.down"),
    ),
    "native_stacked": (
        *_NATIVE_COMMON,
        Row(_STACKED_MOE + "gate.weight", "layers.{i}.moe.router.weight"),
        Row(_STACKED_MOE + "w1", "layers.{i}.moe.experts.gate", flat=True),
        Row(_STACKED_MOE + "w3", "layers.{i}.moe.experts.up", flat=True),
        Row(_STACKED_MOE + "w2", "layers.{i}.moe.experts.down", flat=True, transform="transpose"),
    ),
}
# What export writes: the names that every tool reads.
PUBLISHED = "original"
# How quantized checkpoints name what stands in place of one weight: the endings that follow its
# name, or, where the name ends in ".weight", take the place of that.
QUANTIZED = {
    "GPTQ": (".qweight", ".qzeros", ".scales", ".g_idx"),
    "bitsandbytes 4-bit": (
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.nested_quant_map",
        ".weight.quant_state.bitsandbytes__nf4",
        ".weight.quant_state.bitsandbytes__fp4",
    ),
    "bitsandbytes 8-bit": (".SCB", ".weight_format"),
    "FP8": (".weight_scale", ".weight_scale_inv", ".input_scale"),
}

_ROWS = {layout: {row.leaf: row for row in rows} for layout, rows in LAYOUTS.items()}
# Buffers of old checkpoints that are recomputed, and scales of an 8-bit cache: no weights.
IGNORED = re.compile(
    r"model\.layers\.\d+\.self_attn\."
    r"(rotary_emb\.inv_freq|kv_scale|[kv]_scale|[kv]_proj\.output_scale)"
)
# A leaf of experts, or one part of a quantized one (convert/parts.py).
EXPERT_LEAF = re.compile(r"layers\.\d+\.moe\.experts\.(gate|up|down)(\.\w+\.\w+)?")


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
        modules: the quantized matrices by the name of the weight they stand for.
        tied_head: the embedding and the head, where the file repeats the one as the other.
    """

    layout: str
    sources: Mapping[Chunk, Piece]
    ignored: tuple[str, ...]
    tied_head: tuple[str, str] | None
    modules: Mapping[str, Module] = dataclasses.field(default_factory=dict)


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
    transform: Transform = "as_is"


def moe_marker(layout: str) -> str:
    """What stands between the layer and its router in a layout's names: ``.block_sparse_moe.``."""
    router = _ROWS[layout]["layers.{i}.moe.router.weight"].tensor
    return router.partition("{i}")[2].rpartition("gate.")[0]


def row_of(layout: str, leaf: str) -> Row:
    """The row of the table for a leaf (``layers.3.moe.router.weight``)."""
    generic = re.sub(r"^layers\.\d+\.", "layers.{i}.", leaf)
    return _ROWS[layout][generic]


def pieces(layout: str, specs: Mapping[str, LeafSpec]) -> Iterator[Piece]:
    """Reads the table from leaves to tensors: every chunk of every leaf with its place."""
    for leaf, spec in specs.items():
        row = row_of(layout, leaf)
        layer = re.match(r"layers\.(\d+)\.", leaf)
        i = layer[1] if layer else ""
        k, n = row.part
        for chunk in chunks_of(leaf, spec.shape):
            shape = spec.shape if chunk.expert is None else spec.shape[1:]
            shape = shape[::-1] if row.transform == "transpose" else shape
            num_rows = shape[0]
            if chunk.expert is None or "{e}" in row.tensor:
                start, tensor_shape = 0, shape
            else:
                start = (chunk.expert * n + k) * num_rows
                tensor_shape = (spec.shape[0], num_rows * n, *shape[1:])
                if row.flat:
                    tensor_shape = (spec.shape[0] * num_rows * n, *shape[1:])
            name = row.tensor.format(i=i, e=chunk.expert)
            yield Piece(chunk, Rows(name, start, start + num_rows), tensor_shape, row.transform)


def plan(
    tensors: Mapping[str, Tensor],
    specs: Mapping[str, LeafSpec],
    *,
    source: str | Path,
    problems: list[str] | None = None,
    method: Method | None = None,
) -> Plan:
    """Accounts for every tensor and every leaf exactly once.

    Args:
        tensors: what the files hold.
        specs: what the model needs.
        source: the checkpoint's name, for the error line.
        problems: what was already found wrong; reported together with what is found here.
        method: how matrices are quantized, where the configuration says that some are.

    Raises:
        MixtralError: exit code 65, listing all that is missing, extra, misshapen or mistyped.
    """
    plain, modules = gather(tensors, method)
    _refuse_quantized(plain, method, source)
    named = {**plain, **modules}
    layout = detect_layout(named)
    _refuse_far_more(layout, named, specs, source)
    wanted = list(pieces(layout, specs))
    shapes = {piece.rows.tensor: piece.tensor_shape for piece in wanted}
    ignored = tuple(name for name in plain if IGNORED.fullmatch(name))
    embedding, head = (row_of(layout, leaf).tensor for leaf in ("embed_tokens", "lm_head"))
    tied_head = (embedding, head) if "lm_head" not in specs and head in plain else None
    if tied_head:
        shapes[head] = shapes[embedding]
    found = [*(problems or ())]
    found += [f"missing {name}" for name in shapes if name not in named]
    found += [f"extra {name}" for name in named.keys() - shapes.keys() - set(ignored)]
    found += [f"extra {name}, which is also quantized" for name in plain.keys() & modules.keys()]
    for name in shapes.keys() & plain.keys():
        tensor = plain[name]
        if tensor.shape != tuple(shapes[name]):
            found.append(f"{name}: expected shape {list(shapes[name])}, got {list(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            found.append(f"{name}: expected dtype {' or '.join(FLOATS)}, got {tensor.dtype}")
    if method is not None:
        found += _unsound(wanted, modules, method)
    found += _mixed(wanted, named)
    _exactly_once(wanted, specs)
    if found:
        raise MixtralError(
            f"{source}: {len(found)} problem(s) with its tensors: {listing(found)}",
            fix=_TOGETHER,
            code=BAD_DATA,
        )
    sources = {piece.chunk: piece for piece in wanted}
    return Plan(
        layout=layout, sources=sources, ignored=ignored, tied_head=tied_head, modules=modules
    )


_TOGETHER = "use the config.json and every file that were published together"
# 8x22B has 1,739 tensors; a crafted header may have half a million.
_ENOUGH_NAMES = 4000


def _refuse_far_more(
    layout: str, tensors: Mapping[str, Any], specs: Mapping[str, LeafSpec], source: str | Path
) -> None:
    """Counts before anything is listed by name: a config may ask for millions of tensors."""
    wanted = 0
    for leaf, spec in specs.items():
        row = row_of(layout, leaf)
        if row.part[0] == 0:
            wanted += spec.shape[0] if "{e}" in row.tensor else 1
    if wanted > len(tensors) + _ENOUGH_NAMES:
        raise MixtralError(
            f"{source}: config.json describes {wanted} tensors, its files have {len(tensors)}",
            fix=_TOGETHER,
            code=BAD_DATA,
        )


def detect_layout(tensors: Mapping[str, Any]) -> str:
    """The key of ``LAYOUTS`` whose table names most of the tensors, of the first few thousand."""
    some = list(itertools.islice(tensors, _ENOUGH_NAMES))
    known = {layout: re.compile("|".join(map(_pattern, rows))) for layout, rows in LAYOUTS.items()}
    return max(
        LAYOUTS,
        key=lambda layout: sum(known[layout].fullmatch(name) is not None for name in some),
    )


def _pattern(row: Row) -> str:
    return re.escape(row.tensor).replace(r"\{i\}", r"\d+").replace(r"\{e\}", r"\d+")


def _refuse_quantized(
    tensors: Mapping[str, Any], method: Method | None, source: str | Path
) -> None:
    """Refuses parts of quantized matrices that the configuration does not tell how to read."""
    for scheme, endings in QUANTIZED.items():
        found = next((name for name in tensors if name.endswith(endings)), None)
        if found is not None:
            expected = "weights in f32, bf16 or f16" if method is None else f"{method.name} weights"
            raise MixtralError(
                f"{source}: {found}",
                expected=f"{expected}, as config.json has it",
                got=f"a {scheme} checkpoint",
                fix="use the config.json that was published with it (its quantization_config)",
                code=BAD_DATA,
            )


def _unsound(wanted: list[Piece], modules: Mapping[str, Module], method: Method) -> list[str]:
    """What is wrong with quantized matrices, by the headers of their parts."""
    found = []
    for piece in wanted:
        module = modules.get(piece.rows.tensor)
        if module is None:
            continue
        shape = piece.tensor_shape
        if len(shape) != 2 or piece.transform != "as_is":
            found.append(f"{module.name}: quantized, which is not read there")
        else:
            problems = method.problems(module.parts, (shape[0], shape[1]))
            found += [f"{module.name} ({method.name}): {problem}" for problem in problems]
    return found


def _mixed(wanted: list[Piece], named: Mapping[str, Tensor | Module]) -> list[str]:
    dtypes: dict[str, set[str]] = {}
    for piece in wanted:
        tensor = named.get(piece.rows.tensor)
        if tensor is not None:
            dtype = tensor.dtype if isinstance(tensor, Tensor) else "quantized"
            dtypes.setdefault(piece.chunk.leaf, set()).add(dtype)
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
