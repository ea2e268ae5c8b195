"""Every published layout decodes exactly, against packers that know nothing of the decoders."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from mixtral_jax.convert.parts import join, part_spec, take_apart
from mixtral_jax.convert.quantized.awq import AWQ
from mixtral_jax.convert.quantized.bitsandbytes import EightBit, FourBit
from mixtral_jax.convert.quantized.dense import dequantize
from mixtral_jax.convert.quantized.form import DTYPES
from mixtral_jax.convert.quantized.fp8 import FP8
from mixtral_jax.convert.quantized.gptq import GPTQ, encode
from mixtral_jax.convert.safetensors_file import Tensor
from mixtral_jax.model.transformer import LeafSpec
from tests.convert.quantized import packers

OUT, IN = 64, 128


def gptq(*, bits=4, group_size=32, order=False, sym=True, v2=False) -> GPTQ:
    size = None if group_size == -1 else group_size
    return GPTQ(bits=bits, group_size=size, is_symmetric=sym, has_order=order, is_v2=v2)


GPTQ_CASES = [
    *({"bits": b, "group_size": g, "sym": False} for b in (2, 3, 4, 8) for g in (-1, 32, 64, 128)),
    *({"bits": b, "order": True, "v2": v2} for b in (2, 3, 4, 8) for v2 in (False, True)),
    *({"bits": b, "sym": False, "v2": True} for b in (2, 3, 4, 8)),
    {"bits": 4, "group_size": -1, "order": True},
]
OTHERS = {
    "awq": (AWQ(group_size=32), packers.awq()),
    "awq one group": (AWQ(group_size=None), packers.awq(group_size=-1)),
    "fp8 rows": (FP8(), packers.fp8(per_row=True)),
    "fp8 matrix": (FP8(), packers.fp8(per_row=False, scale_dtype=np.float32, input_scale=True)),
    "nf4": (FourBit(), packers.four_bit("nf4")),
    "fp4": (FourBit(), packers.four_bit("fp4")),
    "nf4 nested": (FourBit(), packers.four_bit("nf4", nested=True)),
    "fp4 in bf16": (FourBit(), packers.four_bit("fp4", nested=True, storage=ml_dtypes.bfloat16)),
    **{
        f"nf4 in {dtype.__name__}": (FourBit(), packers.four_bit("nf4", storage=dtype))
        for dtype in (np.float64, np.int64, np.int16, np.int8, np.uint32)
    },
    "nf4 in f32": (FourBit(), packers.four_bit("nf4", storage=np.float32)),
    "int8": (EightBit(), packers.eight_bit()),
}
CASES = {
    **{f"gptq {case}": (gptq(**case), packers.gptq(**case)) for case in GPTQ_CASES},
    "gptq without g_idx": (gptq(), packers.gptq(with_g_idx=False)),
    **OTHERS,
}


def headers(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    codes = {dtype: name for name, dtype in DTYPES.items()}
    return {
        name: Tensor(
            name=name, file="", dtype=codes[a.dtype], shape=a.shape, start=0, stop=a.nbytes
        )
        for name, a in arrays.items()
    }


def parts_of(method, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {method.endings[ending]: array for ending, array in tensors.items()}


def decode(method, parts, shape=(OUT, IN)):
    found = headers(parts)
    assert method.problems(found, shape) == []
    form = method.form(found, shape, lambda part: parts[part])
    return form, assemble(method, parts, form, shape)


def assemble(method, parts, form, shape=(OUT, IN)):
    found = {part: method.decode(part, parts, shape, form) for part in form.parts}
    return join(form.scheme, found, np.dtype(np.float32))


def dense(q) -> np.ndarray:
    return np.asarray(jax.tree.map(jnp.asarray, q).dequantize())


@pytest.mark.parametrize("case", CASES)
def test_a_matrix_decodes_to_the_last_bit(case):
    method, pack = CASES[case]
    tensors, matrix = pack(np.random.default_rng(1), OUT, IN)
    form, q = decode(method, parts_of(method, tensors))
    assert q.shape == (OUT, IN)
    assert np.array_equal(dense(q), matrix)
    spec = LeafSpec((OUT, IN), ("heads", "embed"), np.dtype(np.float32))
    for part, array in take_apart(q).items():
        wanted = part_spec(spec, form.scheme, part, form.num_groups, form.scales)
        assert (array.size, array.dtype) == (np.prod(wanted.shape), wanted.dtype), part
    out = np.empty((OUT, IN), np.float32)
    dequantize(q, out)
    assert np.array_equal(out, matrix)
    if form.has_order:
        assert not np.array_equal(q.order, np.arange(IN))


def test_a_stack_may_have_one_matrix_out_of_order():
    method, form = gptq(order=True), None
    shuffled, plain = (
        parts_of(method, packers.gptq(order=order)(np.random.default_rng(1), OUT, IN).tensors)
        for order in (True, False)
    )
    form, _ = decode(method, shuffled)
    matrix = packers.gptq()(np.random.default_rng(1), OUT, IN).matrix
    q = assemble(method, plain, form)
    assert np.array_equal(q.order, np.arange(IN))
    assert np.array_equal(dense(q), matrix)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("gptq")])
def test_the_writer_gives_back_every_published_byte(case):
    method, pack = CASES[case]
    tensors = pack(np.random.default_rng(2), OUT, IN).tensors
    _, q = decode(method, parts_of(method, tensors))
    if not method.is_v2 and q.zeros is not None and not q.zeros.all():
        with pytest.raises(ValueError, match="write gptq_v2"):
            encode(q)
        q = dataclasses.replace(q, zeros=np.maximum(q.zeros, 1))
        method = dataclasses.replace(method, is_v2=True)
        tensors = None
    written = encode(q, is_v2=method.is_v2)
    assert [written[name].dtype for name in written] == [np.int32, np.int32, np.float16, np.int32]
    if tensors is not None:
        assert all(
            np.array_equal(tensors[f".{name}"], a)
            for name, a in written.items()
            if f".{name}" in tensors
        )
    _, again = decode(method, written)
    assert jax.tree.all(jax.tree.map(np.array_equal, q, again))


def test_the_writer_refuses_what_the_layout_cannot_hold():
    method, pack = gptq(), packers.gptq()
    _, q = decode(method, parts_of(method, pack(np.random.default_rng(3), OUT, IN).tensors))
    large = dataclasses.replace(q, scales=q.scales.astype(np.float32) * np.float32(1e6))
    with pytest.raises(ValueError, match="too large for the float16"):
        encode(large)
    with pytest.raises(ValueError, match="not nf4"):
        encode(dataclasses.replace(q, scheme="nf4"))
    with pytest.raises(ValueError, match="whole words"):
        encode(dataclasses.replace(q, codes=q.codes[:3], scales=q.scales[:3]))


def faulty(case: str, **changes):
    """The parts of a case with some exchanged (None: left out)."""
    method, pack = CASES[case]
    parts = parts_of(method, pack(np.random.default_rng(4), OUT, IN).tensors)
    parts |= {name: change(parts.get(name)) for name, change in changes.items()}
    return method, {name: part for name, part in parts.items() if part is not None}


ORDERED = next(case for case in CASES if "'order': True" in case)
HEADER_FAULTS = [
    (ORDERED, {"g_idx": lambda a: None}, "missing g_idx"),
    (ORDERED, {"scales": lambda a: None}, "missing scales"),
    (ORDERED, {"qweight": lambda a: a[:-1]}, "qweight: expected shape"),
    (ORDERED, {"qzeros": lambda a: a.astype(np.float32)}, "qzeros: expected dtype I32, got F32"),
    (ORDERED, {"perm": lambda a: np.zeros(3, np.int32)}, "extra perm"),
    ("awq", {"qweight": lambda a: a.T}, "qweight: expected shape"),
    ("fp8 rows", {"weight_scale": lambda a: a[:5]}, "weight_scale: expected shape"),
    ("fp8 rows", {"weight": lambda a: a.astype(np.float32)}, "expected dtype F8_E4M3, got F32"),
    ("nf4", {"weight": lambda a: a[:-1]}, "weight: expected 8192 codes"),
    ("nf4", {"quant_map": lambda a: a[:15]}, "quant_map: expected shape"),
    ("nf4 nested", {"nested_absmax": lambda a: None}, "missing nested_absmax"),
    ("nf4", {"quant_state.bitsandbytes__nf4": lambda a: None}, "expected one quant_state"),
    ("int8", {"SCB": lambda a: a[1:]}, "SCB: expected shape"),
]
CONTENT_FAULTS = [
    (ORDERED, {"g_idx": lambda a: np.where(a == 1, 0, a)}, "g_idx: expected 4 groups of 32"),
    (ORDERED, {"g_idx": lambda a: -a}, "g_idx: expected 4 groups of 32"),
    (ORDERED, {"qzeros": lambda a: a + 1}, "as sym is true"),
    (ORDERED, {"bias": lambda a: np.ones(OUT, np.float16)}, "bias: expected zeros"),
    ("awq", {"bias": lambda a: np.ones(OUT, np.float16)}, "bias: expected zeros"),
    ("nf4", {"quant_map": lambda a: a[::-1].copy()}, r"quant_map\[0\]: expected -1.0, got 1.0"),
    ("nf4", {"absmax": lambda a: a[:-1]}, "absmax: expected shape"),
    ("nf4 nested", {"nested_quant_map": lambda a: a * 2}, "nested_quant_map"),
    ("int8", {"weight_format": lambda a: np.ones((), np.uint8)}, "weight_format"),
]


@pytest.mark.parametrize(("case", "changes", "words"), HEADER_FAULTS)
def test_faults_of_headers_are_told(case, changes, words):
    method, parts = faulty(case, **changes)
    found = method.problems(headers(parts), (OUT, IN))
    assert any(words in problem for problem in found), found


@pytest.mark.parametrize(("case", "changes", "words"), CONTENT_FAULTS)
def test_faults_of_content_are_told(case, changes, words):
    method, parts = faulty(case, **changes)
    with pytest.raises(ValueError, match=words):
        decode(method, parts)


@pytest.mark.parametrize("text", [b"{", b"[1]", b'{"quant_type": "fp4"}', b"{}", b"\xff"])
def test_a_damaged_quant_state_is_told(text):
    octets = np.frombuffer(text, np.uint8)
    method, parts = faulty("nf4", **{"quant_state.bitsandbytes__nf4": lambda a: octets})
    with pytest.raises(ValueError, match="quant_state"):
        decode(method, parts)


@pytest.mark.parametrize("with_g_idx", [True, False])
def test_a_group_size_that_does_not_divide_the_inputs_is_refused(with_g_idx):
    """192 inputs in groups of 128 are no two groups of 96."""
    method, inputs = gptq(group_size=128), 192
    pack = packers.gptq(group_size=96, with_g_idx=with_g_idx)
    parts = parts_of(method, pack(np.random.default_rng(1), OUT, inputs).tensors)
    (problem,) = method.problems(headers(parts), (OUT, inputs))
    assert problem == "group_size 128 does not divide 192 inputs"
    larger = gptq(group_size=256)  # one group that is not full
    parts = parts_of(larger, packers.gptq(group_size=-1)(np.random.default_rng(1), OUT, IN).tensors)
    assert larger.problems(headers(parts), (OUT, IN)) == []


def test_a_matrix_of_an_unfit_size_is_refused():
    method, parts = faulty("nf4")
    assert method.problems(headers(parts), (OUT * 2, IN))
    tensors = packers.four_bit("nf4")(np.random.default_rng(1), 64, 96).tensors
    with pytest.raises(ValueError, match="divisor of the 96 inputs"):
        decode(method, parts_of(method, tensors), (64, 96))


def test_safetensors_has_a_dtype_for_every_part():
    """The names of DTYPES are those that the library writes."""
    for name, dtype in DTYPES.items():
        assert f'"dtype":"{name}"'.encode() in save({"x": np.zeros(1, dtype)})
