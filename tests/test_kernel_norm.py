"""Norm kernels' twins against formulas in float64, and what their plans and refusals say."""

from __future__ import annotations

import pytest
import torch
from planish.kernels import norm, norm_added, norm_quantized
from planish.kernels.norm_rows import norm_rows_kernel, norm_wide_kernel
from planish.kernels.quantized_rows import quantized_twin
from torch import Tensor

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def rows(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * (weight + offset)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_is_the_formula(dtype: torch.dtype, offset: float) -> None:
    x, weight = rows(5, 37, dtype=dtype), rows(37, dtype=dtype, seed=1)
    got = torch.ops.planish.norm_triton(x, weight, None, 1e-5, offset)
    exact = rms(x, weight, 1e-5, offset)
    # two roundings to the dtype, each half an eps of at most the largest value
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    # near miss: the offset is not a matter of rounding
    assert (got.double() - rms(x, weight, 1e-5, 1.0 - offset)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_layer_norm_is_atens(dtype: torch.dtype) -> None:
    x, weight, bias = rows(5, 37, dtype=dtype), rows(37, dtype=dtype), rows(37, dtype=dtype, seed=2)
    got = torch.ops.planish.norm_triton(x, weight, bias, 1e-5, center=True)
    aten = torch.nn.functional.layer_norm(x.double(), (37,), weight.double(), bias.double(), 1e-5)
    assert (got.double() - aten).abs().max() <= torch.finfo(dtype).eps * aten.abs().max()
    uncentered = torch.ops.planish.norm_triton(x, weight, None, 1e-5) + bias
    assert (got - uncentered).abs().max() > 0.01


def test_a_wider_weight_widens_the_result() -> None:
    x = rows(3, 20, dtype=BF16)
    assert torch.ops.planish.norm_triton(x, rows(20), None, 1e-5).dtype == F32
    assert torch.ops.planish.norm_triton(x, rows(20), None, 1e-5, 1.0).dtype == BF16
    assert norm.plan(x, rows(20), None, 1e-5).outputs[0].dtype == F32


def test_the_sum_is_rounded_before_the_norm() -> None:
    x, residual = rows(3, 20, dtype=BF16), rows(3, 20, dtype=BF16, seed=3) * 64
    normed, total = torch.ops.planish.norm_added_triton(x, residual, None, None, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, torch.ops.planish.norm_triton(total, None, None, 1e-5))
    unrounded = torch.ops.planish.norm_triton(x.float() + residual.float(), None, None, 1e-5)
    assert not torch.equal(normed, unrounded.to(BF16))


@pytest.mark.parametrize("codes", ["int8", "fp8"])
def test_codes_are_those_of_the_unfused_norm(codes: str) -> None:
    x, residual = rows(4, 50, dtype=BF16), rows(4, 50, dtype=BF16, seed=1)
    operator = torch.ops.planish.norm_quantized_triton
    coded, scales, total = operator(x, residual, None, None, None, 1e-5, codes=codes)
    plain = torch.ops.planish.norm_triton(x + residual, None, None, 1e-5).double()
    assert torch.equal(total, x + residual)
    assert scales.shape == (4, 1)
    largest = 127 if codes == "int8" else 448
    assert (scales.double() * largest - plain.abs().amax(-1, keepdim=True)).abs().max() < 1e-6
    # half a step of an integer grid, half an eps (2^-4) of a value of e4m3
    apart = (coded.double() * scales - plain).abs()
    allowed = scales * 0.501 if codes == "int8" else plain.abs() * 2.0**-4 * 1.001 + scales * 2**-9
    assert (apart <= allowed).all()


def test_static_scales_saturate() -> None:
    x = torch.tensor([[3.0, -4.0, 0.0, 1.0]])
    coded, scales, total = torch.ops.planish.norm_quantized_triton(
        x, None, None, None, torch.tensor([0.01]), 0.0
    )
    assert scales.numel() == total.numel() == 0
    assert coded.tolist() == [[118, -127, 0, 39]]


def test_rounding_is_half_to_even_and_zeros_stay_zero() -> None:
    halves = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e9]])
    coded, _ = quantized_twin(halves, torch.ones(1), "int8")
    assert coded.tolist() == [[0, 2, 2, 0, -2, 126, 127, 127]]
    coded, scales = quantized_twin(torch.zeros(2, 3), None, "int8")
    assert not coded.any() and not scales.any()
    assert quantized_twin(torch.zeros(2, 0), None, "int8")[0].shape == (2, 0)


@pytest.mark.parametrize(
    ("columns", "kernel", "several"),
    [(20, norm_rows_kernel, 32), (2048, norm_rows_kernel, 1), (16384, norm_rows_kernel, 1)],
)
def test_short_rows_share_a_program(columns: int, kernel: object, several: int) -> None:
    x = torch.empty(70, columns, dtype=F16, device="meta")
    (launch,) = norm.plan(x, None, None, 1e-5).launches
    assert launch.kernel is kernel
    assert launch.constants["ROWS"] == several
    assert launch.grid == (-(-70 // several),)


def test_rows_beyond_the_registers_go_in_passes() -> None:
    x = torch.empty(3, 16385, dtype=F16, device="meta")
    (launch,) = norm.plan(x, None, None, 1e-5).launches
    assert launch.kernel is norm_wide_kernel
    assert launch.grid == (3,)


def test_rows_of_a_wider_matrix_are_read_in_place() -> None:
    wide = torch.empty(6, 4, 100, dtype=F16)
    (launch,) = norm.plan(wide[..., :64], None, None, 1e-5).launches
    assert launch.args["x_stride"] == 100
    assert launch.args["X"].data_ptr() == wide.data_ptr()
    assert norm.why_not("sm_80", wide[..., :64], None, None, 1e-5) is None
    assert "evenly" in str(norm.why_not("sm_80", wide[:, :3, :64], None, None, 1e-5))
    assert "evenly" in str(norm.why_not("sm_80", wide.transpose(0, 1), None, None, 1e-5))
    assert "evenly" in str(norm.why_not("sm_80", wide[..., ::2], None, None, 1e-5))


def test_refusals() -> None:
    x, vector = rows(3, 20, dtype=F16), rows(20, dtype=BF16)
    assert norm.why_not("sm_80", x, vector.half(), None, 1e-5) is None
    assert "bfloat16" in str(norm.why_not("sm_80", x, vector, None, 1e-5))
    assert "float64" in str(norm.why_not("sm_80", x.double(), None, None, 1e-5))
    assert "no bias" in str(norm.why_not("sm_80", x, None, vector.half(), 1e-5))
    assert norm.why_not("sm_80", x, None, vector.half(), 1e-5, center=True) is None
    assert "residual" in str(norm_added.why_not("sm_80", x, x.float(), None, None, 1e-5))
    quantized = norm_quantized.why_not
    assert quantized("sm_89", x, None, None, None, None, 1e-5, codes="fp8") is None
    assert "sm_80" in str(quantized("sm_80", x, None, None, None, None, 1e-5, codes="fp8"))
    assert "gfx942" in str(quantized("gfx942", x, None, None, None, None, 1e-5, codes="fp8"))
    assert "int4" in str(quantized("sm_80", x, None, None, None, None, 1e-5, codes="int4"))
    two = torch.ones(2)
    assert "one float32" in str(quantized("sm_80", x, None, None, None, two, 1e-5))


def test_cost_counts_every_byte_once() -> None:
    x = torch.empty(4, 10, dtype=F16, device="meta")
    weight = torch.empty(10, dtype=F16, device="meta")
    assert norm.cost(x, weight, None, 1e-5).nbytes == 2 * 80 + 20
    assert norm_added.cost(x, x, weight, None, 1e-5).nbytes == 4 * 80 + 20
    assert norm_quantized.cost(x, None, weight, None, None, 1e-5).nbytes == 80 + 40 + 16 + 20


def test_no_rows_are_even_rows() -> None:
    x = torch.empty(2, 0, 64, dtype=F16)
    assert norm_added.why_not("sm_80", x, x, None, None, 1e-5) is None
    assert norm_added.plan(x, x, None, None, 1e-5).launches[0].grid == (0,)
