"""Packed CPU kernels against a float64 product: every width, group, symmetry, size and path."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.encoded import Encoded
from planish.ir.errors import UnsupportedShape, WrongOption
from planish.ir.formats import AffineInt
from planish.ir.interleaved import Interleaved
from planish.kernels import native, plan_cpu
from planish.kernels.catalog import kernels
from planish.kernels.linear_affine import (
    SOURCE,
    PackedAffine,
    cost,
    linear_affine_twin,
    pack,
    why_not,
)
from planish.kernels.rows_affine import rows_affine_twin
from torch import Tensor

_EPS = 2.0**-24
_BLOCK = 64
linear = torch.ops.planish.linear_affine.default
rows_of = torch.ops.planish.rows_affine.default

needs_compiler = pytest.mark.skipif(
    isinstance(native.library(SOURCE), str), reason="no C compiler on this machine"
)


def weight(rows: int, length: int, fmt: AffineInt, seed: int = 0) -> Encoded:
    made = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)) + 0.1
    return fmt.encode(made)


def inputs(tokens: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(tokens, length, generator=torch.Generator().manual_seed(seed))


def run(x: Tensor, packed: PackedAffine, bias: Tensor | None = None) -> Tensor:
    return linear(x, packed.codes, packed.scale, packed.zero, bias, *packed.sizes)


def exact(x: Tensor, encoded: Encoded, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.double()
    return torch.nn.functional.linear(x.double(), encoded.decode(torch.float64), bias)


def bound(x: Tensor, encoded: Encoded, bias: Tensor | None = None) -> Tensor:
    """Worst rounding of any order of float32 sums, or of 24-bit slices of blocks of x.

    Every one of K products, K sums, and the bias and scale of each group rounds once, each time
    by at most 2^-24 of the sum of magnitudes; in slices the largest |x| of a block stands for all.
    """
    length = x.shape[-1]
    size = min(encoded.format.group_size or length, length)  # type: ignore[attr-defined]
    largest = torch.empty_like(x, dtype=torch.float64)
    for group in range(0, length, size):
        for start in range(group, min(group + size, length), _BLOCK):
            block = slice(start, min(start + _BLOCK, group + size, length))
            largest[..., block] = x[..., block].double().abs().amax(-1, keepdim=True)
    magnitude = largest @ encoded.decode(torch.float64).abs().t()
    magnitude += 0 if bias is None else bias.double().abs()
    return (2 * length + 8) * _EPS * magnitude + 1e-38


formats = st.builds(
    AffineInt,
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    group_size=st.sampled_from([None, 1, 7, 32, 64, 100, 600]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float32, torch.float16]),
)


@given(formats, st.integers(1, 40), st.integers(1, 150))
@settings(max_examples=60, deadline=None)
def test_interleaving_is_undone(fmt: AffineInt, rows: int, length: int) -> None:
    encoded = weight(rows, length, fmt)
    layout = Interleaved(fmt.bits, fmt.group_size)
    stored = layout.pack(encoded.codes())
    assert stored.shape == (-(-rows // 16), layout.tile_bytes(length))
    assert torch.equal(layout.unpack(stored, rows, length), encoded.codes())
    groups = layout.pack_groups(encoded.scale)
    assert torch.equal(layout.unpack_groups(groups, rows), encoded.scale)


def test_four_neighbours_lie_in_the_bytes_of_a_word() -> None:
    codes = torch.zeros(17, 9, dtype=torch.uint8)
    codes[16, :] = torch.arange(1, 10)
    words = Interleaved(4).pack(codes)[1].view(2, 16, 4)
    assert words[0, 0].tolist() == [1 | 5 << 4, 2 | 6 << 4, 3 | 7 << 4, 4 | 8 << 4]
    assert words[1, 0].tolist() == [9, 0, 0, 0]


def test_layout_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(UnsupportedShape, match="matrix"):
        Interleaved(4).pack(torch.zeros(2, 3, 4, dtype=torch.uint8))
    with pytest.raises(WrongOption):
        Interleaved(9)


@needs_compiler
@given(
    formats,
    st.integers(1, 50),
    st.integers(1, 200),
    st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17, 130, 200]),
    st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_kernel_rounds_no_more_than_float32_sums(
    fmt: AffineInt, rows: int, length: int, tokens: int, with_bias: bool
) -> None:
    encoded, x = weight(rows, length, fmt), inputs(tokens, length)
    bias = inputs(1, rows, seed=2)[0] if with_bias else None
    packed = pack(encoded)
    wanted, allowed = exact(x, encoded, bias), bound(x, encoded, bias)
    assert ((run(x, packed, bias) - wanted).abs() <= allowed).all()
    twin = linear_affine_twin(x, packed.codes, packed.scale, packed.zero, bias, *packed.sizes)
    assert ((twin - wanted).abs() <= allowed).all()


@needs_compiler
@pytest.mark.parametrize("length", [1700, 520])
@pytest.mark.parametrize("group", [None, 32, 700])
def test_long_rows_are_decoded_in_several_panels(group: int | None, length: int) -> None:
    encoded, x = weight(45, length, AffineInt(4, group, False)), inputs(23, length)
    assert ((run(x, pack(encoded)) - exact(x, encoded)).abs() <= bound(x, encoded)).all()


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 4, 6, 30])
@pytest.mark.parametrize("mutant", ["zero point", "nibble", "scale", "row"])
def test_the_bound_tells_wrong_kernels_apart(tokens: int, mutant: str) -> None:
    encoded, x = weight(21, 77, AffineInt(4, 32, False)), inputs(tokens, 77)
    packed = pack(encoded)
    codes, scale, zero = packed.codes.clone(), packed.scale.clone(), packed.zero
    assert zero is not None
    zero = zero.clone()
    match mutant:
        case "zero point":
            zero[0, 1, 3] += 1
        case "nibble":
            codes[0, 0] = codes[0, 0] >> 4 | (codes[0, 0] & 15) << 4
        case "scale":
            scale[1, 2, 4] *= 1 + 2.0**-9
        case _:
            codes[0] = codes[0].view(-1, 16, 4).roll(1, dims=1).flatten()
    wrong = linear(x, codes, scale, zero, None, *packed.sizes)
    assert ((wrong - exact(x, encoded)).abs() > bound(x, encoded)).any()


@needs_compiler
def test_negative_scales_and_constant_groups() -> None:
    made = torch.cat([-torch.rand(5, 40) - 1, torch.full((1, 40), 0.75), torch.zeros(1, 40)])
    encoded = AffineInt(4, 32).encode(made)
    assert (encoded.scale != 0).any() and torch.equal(encoded.decode()[-1], torch.zeros(40))
    for tokens in (1, 7, 20):
        x = inputs(tokens, 40)
        assert ((run(x, pack(encoded)) - exact(x, encoded)).abs() <= bound(x, encoded)).all()


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 6, 20])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_where_a_float_product_sends_it(tokens: int, value: float) -> None:
    encoded, x = weight(19, 40, AffineInt(8, 32)), inputs(tokens, 40)
    x[0, 35] = value
    got, wanted = run(x, pack(encoded)), exact(x, encoded).float()
    assert torch.equal(got[0].isnan(), wanted[0].isnan())
    assert torch.equal(got[0].nan_to_num(0).sign(), wanted[0].nan_to_num(0).sign())
    assert got[1:].isfinite().all()


@needs_compiler
@pytest.mark.parametrize("size", [0.0, 1e-36, 1e-20, 1e30])
def test_activations_of_any_size(size: float) -> None:
    encoded, x = weight(19, 40, AffineInt(4, 32)), inputs(1, 40) * size
    assert ((run(x, pack(encoded)) - exact(x, encoded)).abs() <= bound(x, encoded)).all()


@needs_compiler
def test_one_outlier_leaves_the_other_blocks_alone() -> None:
    encoded, x = weight(33, 96, AffineInt(4, 32)), inputs(1, 96)
    x[0, 5] = 3e4
    assert ((run(x, pack(encoded)) - exact(x, encoded)).abs() <= bound(x, encoded)).all()


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    encoded, x = weight(21, 50, AffineInt(8)), inputs(5, 50).to(dtype)
    got = run(x, pack(encoded))
    wanted = exact(x, encoded)
    step = torch.finfo(dtype).eps / 2 * wanted.abs()
    assert got.dtype == dtype
    assert ((got - wanted).abs() <= step * 1.01 + bound(x, encoded)).all()


@needs_compiler
def test_shapes_strides_and_threads() -> None:
    encoded = weight(300, 576, AffineInt(4, 32))
    packed = pack(encoded)
    wide = inputs(12, 576 * 2).view(2, 3, 2, 576 * 2)[..., ::2]
    assert torch.equal(
        run(wide, packed), run(wide.contiguous().view(12, 576), packed).view(2, 3, 2, 300)
    )
    assert run(wide[:0], packed).shape == (0, 3, 2, 300)
    assert run(wide[0, 0, 0], packed).shape == (300,)
    before, alone = torch.get_num_threads(), run(wide, packed)
    try:
        torch.set_num_threads(3)
        assert torch.equal(run(wide, packed), alone)
    finally:
        torch.set_num_threads(before)


@needs_compiler
@given(formats, st.integers(1, 40), st.integers(1, 150))
@settings(max_examples=60, deadline=None)
def test_looked_up_rows_are_the_formats_own_values(fmt: AffineInt, rows: int, length: int) -> None:
    encoded = weight(rows, length, fmt)
    packed = pack(encoded)
    ids = torch.randint(0, rows, (2, 5))
    got = rows_of(ids, packed.codes, packed.scale, packed.zero, *packed.sizes)
    twin = rows_affine_twin(ids, packed.codes, packed.scale, packed.zero, *packed.sizes)
    assert torch.equal(got, encoded.decode(torch.float32)[ids])
    assert torch.equal(twin, got)


@needs_compiler
@pytest.mark.parametrize("wrong", [-1, 7])
def test_an_index_outside_the_table_is_refused(wrong: int) -> None:
    packed = pack(weight(7, 5, AffineInt(8)))
    with pytest.raises(IndexError, match="7 rows"):
        rows_of(torch.tensor([wrong]), packed.codes, packed.scale, packed.zero, *packed.sizes)


@needs_compiler
def test_why_not() -> None:
    good = weight(7, 50, AffineInt(4, 32))
    assert why_not(good, torch.float32) is None
    assert why_not(good, torch.float64) == (
        "the activations are torch.float64, and the kernel computes in float32"
    )
    stack = AffineInt(4, 32).encode(torch.randn(3, 7, 50))
    assert why_not(stack, torch.float32) == "it is a stack of matrices [3, 7, 50]"
    wide = AffineInt(4, 32, scale_dtype=torch.float64).encode(torch.randn(7, 50))
    assert "scales are float64" in (why_not(wide, torch.float32) or "")
    huge = AffineInt(4).encode(torch.full((2, 3), 3e38))
    assert "largest float32" in (why_not(huge, torch.float32) or "")


def test_without_a_compiler_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    native.library.cache_clear()
    try:
        assert why_not(weight(7, 50, AffineInt(4)), torch.float32) == (
            "there is no C compiler on this machine (CC, cc, gcc or clang)"
        )
    finally:
        native.library.cache_clear()


@needs_compiler
def test_plain_instructions_give_the_same(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for processors without wide vectors, on this one."""
    monkeypatch.setenv("PLANISH_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_TUNED", ())
    monkeypatch.setattr(native, "_FLAGS", ["-O1", *native._FLAGS[1:]])
    native.library.cache_clear()
    try:
        plain = native.library(SOURCE)
    finally:
        native.library.cache_clear()
    assert isinstance(plain, ctypes.CDLL)
    call = plain.planish_linear_affine
    call.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 7
    for bits in (2, 4, 8):
        encoded = weight(37, 75, AffineInt(bits, 32, False))
        packed = pack(encoded)
        for tokens in (1, 3, 4, 11):
            x, out = inputs(tokens, 75), torch.empty(tokens, 37)
            parts = (x, packed.codes, packed.scale, packed.zero)
            pointers = [part.data_ptr() for part in parts if part is not None]
            rest = (packed.group, packed.codes.shape[1], packed.width, 1)
            assert call(*pointers, None, out.data_ptr(), tokens, 37, 75, *rest) == 0
            assert ((out - exact(x, encoded)).abs() <= bound(x, encoded)).all()


def test_catalog_and_cost() -> None:
    assert {"linear_affine", "rows_affine", "attention_cpu"} <= set(kernels())
    one = cost(tokens=1, rows=10, length=64, width=4, group=32, zeros=False)
    assert one.nbytes == 10 * (32 + 8) + 4 * 74
    assert one.flops == 2 * 640


@needs_compiler
@given(
    formats,
    st.integers(1, 50),
    st.integers(1, 200),
    st.sampled_from([9, 12, 13, 31]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_rounded_activations_are_the_nearest_of_255_steps(
    fmt: AffineInt, rows: int, length: int, tokens: int, with_bias: bool
) -> None:
    """As the product with inputs that were rounded by hand, by blocks of at most 64 columns."""
    encoded, x = weight(rows, length, fmt), inputs(tokens, length)
    x[0] = 0
    bias = inputs(1, rows, seed=2)[0] if with_bias else None
    packed = pack(encoded)
    nearest = x.double()
    for group in range(0, length, packed.group):
        for start in range(group, min(group + packed.group, length), _BLOCK):
            block = slice(start, min(start + _BLOCK, group + packed.group, length))
            largest = x[:, block].abs().amax(-1, keepdim=True)
            steps = torch.round(x[:, block] * (127 / largest)).double()
            nearest[:, block] = (steps * (largest / 127).double()).nan_to_num()
    got = torch.empty(tokens, rows)
    step = plan_cpu.record(
        plan_cpu.Kind.LINEAR,
        [
            part if part is None else part.data_ptr()
            for part in (x, packed.codes, packed.scale, packed.zero, bias)
        ],
        got.data_ptr(),
        [rows, length, packed.group, packed.codes.stride(0), packed.width, 1],
    )
    call = plan_cpu.CallRecord(0, tokens, 0, 32, tokens)
    plan_cpu.run_steps((plan_cpu.StepRecord * 1)(step), 1, call, 2)
    rounded = (got - exact(nearest, encoded, bias)).abs() <= bound(nearest.float(), encoded, bias)
    plain = (got - exact(x, encoded, bias)).abs() <= bound(x, encoded, bias)
    assert rounded.all() or plain.all()  # the latter on a processor without products of bytes
