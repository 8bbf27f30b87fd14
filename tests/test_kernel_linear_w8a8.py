"""The int8 linear layer's twin against integer arithmetic, its plan and its refusals."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from planish.kernels.linear_bytes_tiles import linear_bytes_kernel, linear_bytes_split_kernel
from planish.kernels.linear_w8a8 import LONGEST, cost, plan, why_not
from planish.kernels.linear_w8a8_cases import int8_weight
from planish.kernels.quantized_rows import asymmetric_twin
from torch import Tensor

HALF, FULL = torch.float16, torch.float32
operator = torch.ops.planish.linear_w8a8


def problem(tokens: int = 5, width: int = 7, length: int = 19) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return (random(tokens, length) + 0.5, *int8_weight(random, width, length))


def test_dynamic_codes_are_rounded_row_by_row() -> None:
    x, weight, scale = problem()
    x[2] = 0.0
    wanted = torch.zeros(5, 7, dtype=torch.float64)
    for i, row in enumerate(x):
        step = row.abs().max() / 127
        codes = [round(float(v / step)) if step else 0 for v in row]
        for j in range(7):
            total = sum(a * int(b) for a, b in zip(codes, weight[j], strict=True))
            wanted[i, j] = total * float(step) * float(scale[j])
    got = operator(x, weight, scale)
    assert (got.double() - wanted).abs().max() <= 4 * 2.0**-24 * wanted.abs().max()
    # rounding x costs something, so that a twin which forgot to would be seen
    unrounded = x.double() @ (weight.double() * scale.double()[:, None]).t()
    assert (got.double() - unrounded).abs().max() > 1e-4


def test_zero_points_are_exact() -> None:
    x, weight, scale = problem()
    sums = weight.sum(1, dtype=torch.int32)
    codes, steps, zeros = asymmetric_twin(x, None, None)
    assert codes.min() == -128 and codes.max() == 127
    loose = (codes.double() - zeros) * steps
    # within half a step of x, and half a step more where the zero point was rounded
    assert ((loose - x).abs() <= steps.double() * 1.01).all()
    wanted = loose @ (weight.double() * scale.double()[:, None]).t()
    got = operator(x, weight, scale, weight_sums=sums)
    assert (got.double() - wanted).abs().max() <= 4 * 2.0**-24 * wanted.abs().max()
    wrong = operator(x, weight, scale, weight_sums=sums + 1)
    assert (wrong - got).abs().max() > 0.001


def test_zero_has_a_code_whatever_the_range() -> None:
    x = torch.tensor([[0.0, 5.0, 6.0], [0.0, -5.0, -6.0], [0.0, 0.0, 0.0]])
    codes, steps, zeros = asymmetric_twin(x, None, None)
    assert torch.equal(codes[:, :1].int(), zeros)
    assert zeros.flatten().tolist() == [-128, 127, -128]
    assert torch.equal(steps.flatten(), torch.tensor([6.0, 6.0, 0.0]) / 255)


def test_codes_given_are_taken_as_they_are() -> None:
    _, weight, scale = problem()
    codes = torch.randint(-128, 128, (5, 19), generator=torch.Generator().manual_seed(1))
    steps, zeros = torch.rand(5) + 0.1, torch.arange(5, dtype=torch.int32) - 2
    sums = weight.sum(1, dtype=torch.int32)
    coded = codes.to(torch.int8)
    got = operator(coded, weight, scale, steps, zeros, sums, dtype=HALF)
    exact = (codes - zeros[:, None]).double() @ weight.double().t()
    exact = exact * steps.double()[:, None] * scale.double()
    assert got.dtype == HALF
    assert torch.equal(got, exact.to(HALF))
    assert operator(coded, weight, scale, steps[:1]).dtype == FULL


def test_the_epilogue_comes_last() -> None:
    x, weight, scale = problem()
    bias, gate, residual = torch.randn(7), torch.randn(5, 7), torch.randn(5, 7)
    plain = operator(x, weight, scale)
    got = operator(x, weight, scale, None, None, None, bias, gate, residual, "silu")
    wanted = torch.nn.functional.silu(plain + bias) * gate + residual
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "split"), [(1, True), (16, True), (17, False)])
def test_few_rows_are_split(tokens: int, split: bool) -> None:
    weight = torch.empty(4096, 4096, dtype=torch.int8, device="meta")
    x = torch.empty(tokens, 4096, dtype=HALF, device="meta")
    launches = plan(x, weight, torch.empty(4096, device="meta")).launches
    assert launches[0].grid == (tokens,)
    kernel = linear_bytes_split_kernel if split else linear_bytes_kernel
    assert launches[1].kernel is kernel
    assert len(launches) == 2 + split
    assert launches[1].constants["ALIGN"] == 16
    assert launches[1].args["length"] == 4096 // 16


def test_odd_lengths_load_bytes() -> None:
    weight = torch.empty(64, 4099, dtype=torch.int8, device="meta")
    x = torch.empty(100, 4099, dtype=HALF, device="meta")
    (_, launch) = plan(x, weight, torch.empty(64, device="meta")).launches
    assert launch.constants["ALIGN"] == 1
    assert launch.args["X"].stride(0) == 4112  # rows of codes start on 16 bytes


def test_refusals() -> None:
    x, weight, scale = problem()
    sums, zero, one = weight.sum(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), scale[:1]

    def refused(word: str, *args: Any, **kwargs: Any) -> bool:
        return word in str(why_not("sm_80", *args, **kwargs))

    assert why_not("sm_80", x, weight, scale) is None
    assert why_not("sm_80", x, weight, scale, one, zero, sums) is None
    assert why_not("sm_80", x, weight, scale, None, None, sums) is None
    assert refused("float64", x.double(), weight, scale)
    assert refused("float32", x, weight.float(), scale)
    assert refused("side by side", x[:, :7], weight.t(), scale[:1])
    assert refused("scales for 7", x, weight, scale[:3])
    assert refused("without a scale", x.to(torch.int8), weight, scale)
    assert refused("go together", x, weight, scale, one, zero)
    assert refused("go together", x, weight, scale, one, None, sums)
    assert refused("tokens", x, weight, scale, scale[:5])
    assert refused("int32", x, weight, scale, one, zero.long(), sums)
    long = torch.empty(2, LONGEST + 1, dtype=torch.int8, device="meta")
    assert refused("32 bits", torch.empty(3, LONGEST + 1, device="meta"), long, one)


def test_no_sum_of_a_longest_row_leaves_32_bits() -> None:
    assert Fraction(LONGEST) * 255 * 127 < 2**31 < Fraction(LONGEST) * 255 * 129


def test_cost_counts_codes_as_written_and_read() -> None:
    x = torch.empty(4, 16, dtype=HALF, device="meta")
    weight = torch.empty(8, 16, dtype=torch.int8, device="meta")
    scale = torch.empty(8, device="meta")
    made = cost(x, weight, scale)
    assert made.nbytes == (4 * 16 * 2) + (2 * 4 * 16) + (8 * 16 + 32) + (4 * 8 * 2)
    assert made.flops == 2 * 4 * 8 * 16
    codes = torch.empty(4, 16, dtype=torch.int8, device="meta")
    given = cost(codes, weight, scale, torch.empty(1, device="meta"), dtype=HALF)
    assert given.nbytes == 4 * 16 + 4 + (8 * 16 + 32) + 4 * 8 * 2
