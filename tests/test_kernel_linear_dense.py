"""Linear layers on dense weights: the operation, its launches and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planish.kernels import linear_dense
from planish.kernels.linear_dense import SPEC, choose, plan, why_not
from planish.kernels.linear_split import split_count


def made(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_the_twin_is_the_formula() -> None:
    x, w, bias = made(2, 3, 8).double(), made(5, 8, seed=1).double(), made(5, seed=2).double()
    gate, residual = made(2, 3, 5, seed=3).double(), made(2, 3, 5, seed=4).double()
    sums = torch.einsum("abk,nk->abn", x, w) + bias
    expected = sums * torch.sigmoid(sums) * gate + residual
    found = SPEC.twin(x, w, bias, gate, residual, "silu")
    assert (found - expected).abs().max() <= 8 * 8 * 2**-52 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_twin_rounds_once(dtype: torch.dtype) -> None:
    x, w, residual = made(3, 64, dtype=dtype), made(7, 64, seed=1, dtype=dtype), made(3, 7)
    exact = x.double() @ w.double().T + residual.double()
    error = (SPEC.twin(x, w, residual=residual).double() - exact).abs()
    unit = torch.finfo(dtype).eps / 2
    assert bool((error <= unit * exact.abs() + 64 * 2**-24 * 64).all())


def test_the_operator_is_registered_and_has_a_shape_rule() -> None:
    x, w, bias = made(2, 3, 8), made(5, 8, seed=1), made(5, seed=2)
    operator = torch.ops.planish.linear_dense
    assert torch.equal(operator(x, w, bias), torch.nn.functional.linear(x, w, bias))
    torch.library.opcheck(operator.default, (x, w, bias, None, None, "gelu", "tf32"))
    assert operator(meta(4, 2, 8), meta(5, 8)).shape == (4, 2, 5)


@pytest.mark.parametrize(("rows", "kernels"), [(1, 2), (16, 2), (17, 1), (2048, 1)])
def test_few_rows_are_split(rows: int, kernels: int) -> None:
    launches = plan(meta(rows, 4096), meta(4096, 4096)).launches
    assert len(launches) == kernels
    if kernels == 2:
        parts = launches[0].args["PARTS"]
        assert parts.shape == (launches[0].grid[1], rows, 4096)
        assert launches[1].args["PARTS"] is parts


@pytest.mark.parametrize(("tiles", "blocks"), [(64, 64), (172, 33), (1, 5), (1000, 9), (3, 170)])
def test_every_split_has_work(tiles: int, blocks: int) -> None:
    splits = split_count(tiles, blocks)
    run = -(-blocks // splits)
    assert (splits - 1) * run < blocks <= splits * run


@pytest.mark.parametrize(("length", "apart", "align"), [(64, 64, 8), (60, 64, 1), (64, 68, 1)])
def test_wide_loads_only_where_rows_are_aligned(length: int, apart: int, align: int) -> None:
    x, w = meta(32, apart)[:, :length], meta(40, length)
    (launch,) = plan(x, w).launches
    assert launch.constants["ALIGN"] == align
    assert launch.args["length"] * align == length
    assert launch.args["x_stride"] * align == apart


def test_a_tensor_that_starts_off_16_bytes_is_read_element_by_element() -> None:
    held = made(32 * 64 + 1, dtype=torch.float16)
    for start, align in ((0, 8), (1, 1)):
        x = held[start : start + 32 * 64].view(32, 64)
        (launch,) = plan(x, made(40, 64, dtype=torch.float16)).launches
        assert launch.constants["ALIGN"] == align


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_120", "gfx942", "gfx1100"])
@pytest.mark.parametrize("rows", [1, 64, 5000])
def test_every_architecture_has_a_configuration(arch: str, rows: int) -> None:
    config = choose(rows, 4096, arch)
    assert config.serves(arch)
    assert ("GROUP" in config.constants) == (rows > 16)


def test_small_results_take_small_tiles() -> None:
    assert choose(128, 1024, "sm_80").constants["BM"] < choose(4096, 4096, "sm_80").constants["BM"]


def test_generated_operands_replace_the_standard_ones() -> None:
    x, w, scale = meta(32, 64), meta(40, 64), meta(32, 40)
    (launch,) = plan(x, w, bias=meta(40), finish="F", operands=[None, scale]).launches
    assert launch.args["E0"] is None
    assert launch.args["E1"].shape == (32, 40)
    assert launch.constants["FINISH"] == "F"


X, W = meta(3, 8), meta(5, 8)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"bias": meta(5), "gate": meta(3, 5), "activation": "silu", "precision": "tf32"}, None),
        ({"residual": meta(5)}, None),
        ({"x": meta(3, 8, dtype=torch.float64)}, "its weight is torch.float16 [5, 8]"),
        ({"weight": meta(5, 7)}, "its activations have 8 columns where the weight has 7"),
        ({"weight": meta(8, 5).t()}, "the columns of its weight do not lie side by side"),
        ({"weight": meta(2, 5, 8)}, "its weight is torch.float16 [2, 5, 8]"),
        ({"x": meta(3, 0), "weight": meta(5, 0)}, "it sums over nothing"),
        ({"activation": "tanh"}, "there is no kernel for the activation tanh"),
        ({"precision": "bf16x3"}, "there is no precision bf16x3"),
        ({"bias": meta(1, 5)}, "its bias has the shape [1, 5]"),
        ({"gate": meta(1, 5)}, "its epilogue reads a tensor of the shape [1, 5]"),
    ],
)
def test_what_it_cannot_take(changed: dict[str, Any], reason: str | None) -> None:
    assert why_not("sm_80", **{"x": X, "weight": W, **changed}) == reason


def test_float64_is_refused() -> None:
    x, w = meta(3, 8, dtype=torch.float64), meta(5, 8, dtype=torch.float64)
    assert why_not("sm_80", x, w) == "its activations are torch.float64"


def test_cost_counts_each_tensor_once() -> None:
    cost = linear_dense.cost(meta(3, 8), meta(5, 8), bias=meta(5), residual=meta(3, 5))
    assert cost.nbytes == 2 * (24 + 40 + 5 + 15 + 15)
    assert cost.flops == 2 * 3 * 5 * 8
