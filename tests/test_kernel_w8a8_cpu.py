"""int8 CPU products against float64: every width, group, zero point and odd size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir import activation_ops as _ops
from planish.ir.formats import AffineInt
from planish.kernels import native
from planish.kernels.catalog import kernels
from planish.kernels.linear_affine import pack
from planish.kernels.linear_w8a8_cpu import (
    LONGEST,
    SOURCE,
    code_sums,
    cost,
    linear_w8a8_cpu_twin,
    why_not,
)
from planish.kernels.quantize_rows_cpu import quantize_rows_cpu_twin
from planish.kernels.quantize_rows_cpu import why_not as rows_why_not

OPS = torch.ops.planish
EPS = 2.0**-24
assert _ops.STEPS == 255
needs_compiler = pytest.mark.skipif(
    isinstance(native.library(SOURCE), str), reason="no C compiler on this machine"
)

formats = st.builds(
    AffineInt,
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    group_size=st.sampled_from([None, 4, 7, 32, 64]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from([torch.float32, torch.float16]),
)


@needs_compiler
@given(
    formats,
    st.integers(1, 150),
    st.integers(1, 200),
    st.sampled_from([1, 2, 3, 5, 6, 7, 13, 49, 100]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_only_scales_and_sums_of_groups_are_rounded(
    fmt: AffineInt, rows: int, length: int, tokens: int, each: bool, shifted: bool, biased: bool,
    seed: int,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    encoded = fmt.encode(torch.randn(rows, length, generator=draw) + 0.1)
    packed = pack(encoded)
    codes = torch.randint(-128, 128, (tokens, length), generator=draw, dtype=torch.int8)
    count = tokens if each else 1
    scale = torch.rand(count, 1, generator=draw) + 0.1
    zero = torch.randint(-128, 128, (count, 1), generator=draw, dtype=torch.int32)
    bias = torch.randn(rows, generator=draw) if biased else None
    given = (
        codes,
        scale,
        zero if shifted else None,
        packed.codes,
        packed.scale,
        packed.zero,
        code_sums(encoded) if shifted else None,
        bias,
        *packed.sizes,
    )
    found, twin = OPS.linear_w8a8_cpu(*given), linear_w8a8_cpu_twin(*given)
    steps = codes.double() - (zero if shifted else 0)
    groups = -(-length // packed.group)
    # Magnitudes of the two integer sums of a group, which a zero point of the weight subtracts.
    largest = 256.0 * encoded.scale.abs().double().amax(-1)
    size = steps.abs().sum(-1, keepdim=True) * scale.double() * largest
    size += 0 if bias is None else bias.abs().double()
    assert bool(((found - twin).abs() <= (groups + 8) * EPS * size + 1e-38).all())


@needs_compiler
def test_sums_are_exact_where_float32_would_round() -> None:
    """The longest row: every product at its largest magnitude."""
    weight = torch.full((16, LONGEST), 127.0)
    weight[:, ::2] = 126.0
    encoded = AffineInt(8).encode(weight)
    packed = pack(encoded)
    codes = torch.full((2, LONGEST), 127, dtype=torch.int8)
    zero = torch.full((1,), -128, dtype=torch.int32)
    found = OPS.linear_w8a8_cpu(
        codes, torch.ones(1), zero, packed.codes, packed.scale, None, code_sums(encoded), None,
        *packed.sizes,
    )  # fmt: skip
    exact = 255 * (127 + 126) * LONGEST // 2
    assert bool(((found.double() - exact).abs() <= 2 * EPS * exact).all())


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 100), st.integers(-30, 30), st.integers(0, 2**31))
def test_rows_get_the_codes_of_the_reference(
    tokens: int, length: int, power: int, seed: int
) -> None:
    x = torch.randn(2, tokens, length, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    x[0, 0] = 0
    x[1, -1] = torch.round(x[1, -1] / x[1, -1].abs().max() * 254) / 2  # ties
    codes, scale = OPS.quantize_rows_cpu(x)
    wanted = OPS.activation_scale(x, "token")
    assert torch.equal(scale, wanted) and torch.equal(codes, OPS.quantize(x, wanted))
    assert all(map(torch.equal, (codes, scale), quantize_rows_cpu_twin(x)))


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_get_a_step_of_nan(bad: float) -> None:
    x = torch.ones(3, 5)
    x[1, 2] = bad
    scale = OPS.quantize_rows_cpu(x)[1]
    assert scale.isnan().flatten().tolist() == [False, True, False]


def test_refusals_are_sentences() -> None:
    assert "float64" in str(why_not(AffineInt(8).encode(torch.randn(3, 4)), torch.float64))
    long = AffineInt(8).encode(torch.randn(1, LONGEST + 1))
    assert "may not fit in 32 bits" in str(why_not(long, torch.float32))
    assert "bfloat16" in str(rows_why_not(torch.bfloat16))


def test_both_are_in_the_catalog_with_a_cost() -> None:
    assert {"linear_w8a8_cpu", "quantize_rows_cpu"} <= set(kernels())
    packed = pack(AffineInt(8).encode(torch.randn(32, 64)))
    told = cost(5, packed)
    assert told.nbytes == 32 * 64 + 4 * 32 + 5 * (64 + 4 + 4 * 32) and told.flops == 10 * 32 * 64
    assert kernels()["quantize_rows_cpu"].cost(2, 8).nbytes == 2 * (40 + 4)
