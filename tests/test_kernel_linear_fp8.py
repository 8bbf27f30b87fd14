"""The fp8 linear layer's twin against float64, its plan and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planish.kernels.linear_bytes_tiles import linear_bytes_kernel, linear_bytes_split_kernel
from planish.kernels.linear_fp8 import FP8, cost, plan, why_not
from planish.kernels.quantized_rows import quantized_twin
from torch import Tensor

HALF, FULL = torch.float16, torch.float32
operator = torch.ops.planish.linear_fp8


def problem(tokens: int = 5, width: int = 7, length: int = 19) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, length, generator=generator)
    weight, scale = quantized_twin(torch.randn(width, length, generator=generator), None, "fp8")
    return x, weight, scale.flatten()


def test_products_of_rounded_values() -> None:
    x, weight, scale = problem()
    x[2] = 0.0
    steps = x.abs().amax(1, keepdim=True) / 448
    codes = (x / torch.where(steps == 0, 1.0, steps)).to(FP8)
    wanted = (codes.double() * steps) @ (weight.double() * scale.double()[:, None]).t()
    got = operator(x, weight, scale)
    # float32: 19 products, their sums, two scales
    assert (got.double() - wanted).abs().max() <= 24 * 2.0**-24 * wanted.abs().max()
    assert not got[2].any()
    unrounded = x.double() @ (weight.double() * scale.double()[:, None]).t()
    assert (got.double() - unrounded).abs().max() > 1e-3


def test_a_static_scale_saturates() -> None:
    _, weight, scale = problem(length=2)
    x = torch.tensor([[1000.0, -1000.0]])
    got = operator(x, weight, scale, torch.ones(1))
    assert torch.equal(got, operator(x.clamp(-448, 448), weight, scale, torch.ones(1)))
    assert not torch.equal(got, operator(x / 4, weight, scale, torch.ones(1)))


def test_codes_given_are_taken_as_they_are() -> None:
    x, weight, scale = problem()
    codes, steps = quantized_twin(x, None, "fp8")
    got = operator(codes, weight, scale, steps.flatten(), dtype=HALF)
    assert got.dtype == HALF
    assert torch.equal(got, operator(x, weight, scale).to(HALF))
    # a result in 16 bit of x in 16 bit would have rounded x first
    assert not torch.equal(got, operator(x.to(HALF) * 1.001, weight, scale))


@pytest.mark.parametrize(("tokens", "split"), [(1, True), (16, True), (17, False)])
def test_few_rows_are_split(tokens: int, split: bool) -> None:
    weight = torch.empty(4096, 4096, dtype=FP8, device="meta")
    x = torch.empty(tokens, 4096, dtype=HALF, device="meta")
    launches = plan(x, weight, torch.empty(4096, device="meta")).launches
    assert launches[1].kernel is (linear_bytes_split_kernel if split else linear_bytes_kernel)
    assert launches[0].args["CODES"].dtype == FP8
    if split:
        assert launches[1].args["PARTS"].dtype == FULL


def test_refusals() -> None:
    x, weight, scale = problem()
    codes = x.to(FP8)

    def refused(word: str, arch: str, *args: Any, **kwargs: Any) -> bool:
        return word in str(why_not(arch, *args, **kwargs))

    for arch in ("sm_89", "sm_90", "sm_100", "sm_120"):
        assert why_not(arch, x, weight, scale) is None
    assert refused("sm_80 has no fp8", "sm_80", x, weight, scale)
    assert refused("gfx942", "gfx942", x, weight, scale)
    assert why_not("sm_90", codes, weight, scale, scale[:5], dtype=HALF) is None
    assert refused("without a scale", "sm_90", codes, weight, scale, dtype=HALF)
    assert refused("goes with codes", "sm_90", codes, weight, scale, scale[:5])
    assert refused("goes with codes", "sm_90", x, weight, scale, dtype=HALF)
    assert refused("tokens", "sm_90", x, weight, scale, scale[:5])
    assert refused("float32 [7, 19]", "sm_90", x, weight.float(), scale)
    assert refused("scales for 7", "sm_90", x, weight, scale[:3])


def test_cost_counts_codes_as_written_and_read() -> None:
    x = torch.empty(4, 16, dtype=HALF, device="meta")
    weight = torch.empty(8, 16, dtype=FP8, device="meta")
    made = cost(x, weight, torch.empty(8, device="meta"))
    assert made.nbytes == (4 * 16 * 2) + (2 * 4 * 16) + (8 * 16 + 32) + (4 * 8 * 2)
    assert made.flops == 2 * 4 * 8 * 16
