"""Operations of quantized activations: nearest codes, exact zeros, shapes, and odd values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir import activation_ops as _ops
from planish.kernels.quantized_rows import asymmetric_twin, quantized_twin
from torch import Tensor

OPS = torch.ops.planish
EPS = torch.finfo(torch.float32).eps
assert _ops.PER == ("tensor", "token")


@st.composite
def values(draw: st.DrawFn) -> Tensor:
    """[2, tokens, channels] of some magnitude, some rows constant or zero."""
    sizes = (2, draw(st.integers(1, 5)), draw(st.integers(1, 9)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(sizes, generator=generator) * 10.0 ** draw(st.integers(-6, 6))
    x[0, 0] = draw(st.sampled_from([0.0, 1.5, -3.0]))
    return x + draw(st.sampled_from([0.0, 2.0, -50.0]))


@settings(max_examples=80, deadline=None)
@given(values(), st.sampled_from(["token", "tensor"]), st.booleans())
def test_values_come_back_within_half_a_step(x: Tensor, per: str, symmetric: bool) -> None:
    scale = OPS.activation_scale(x, per, symmetric)
    zero = None if symmetric else OPS.activation_zero(x, scale, per)
    codes = OPS.quantize(x, scale, zero)
    back = OPS.dequantize(codes, scale, zero, dtype=x.dtype)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32
    assert scale.shape == ((*x.shape[:-1], 1) if per == "token" else (1,))
    # Half a step, half another where the zero point was rounded, and float32 roundings.
    reach = 0.5 if symmetric else 1.0
    slack = 4 * EPS * (x.abs() + 256 * scale)
    assert bool(((x - back).abs() <= reach * scale + slack).all())
    assert bool((back[x == 0] == 0).all())


@settings(max_examples=40, deadline=None)
@given(values())
def test_the_same_codes_as_the_gpu_kernels_twins(x: Tensor) -> None:
    scale = OPS.activation_scale(x, "token")
    codes, steps = quantized_twin(x, None, "int8")
    assert torch.equal(steps, scale) and torch.equal(codes, OPS.quantize(x, scale))
    scale = OPS.activation_scale(x, "token", False)
    zero = OPS.activation_zero(x, scale, "token")
    codes, steps, _ = asymmetric_twin(x, scale, zero)
    assert torch.equal(codes, OPS.quantize(x, scale, zero))


def test_ties_go_to_even_and_values_outside_are_held() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 400.0, -400.0]])
    one = torch.ones(1)
    assert OPS.quantize(x, one).tolist() == [[0, 2, 2, 0, -2, 127, -127]]
    zero = torch.tensor([-28], dtype=torch.int32)
    assert OPS.quantize(x, one, zero).tolist() == [[-28, -26, -26, -28, -30, 127, -128]]


def test_a_row_of_zeros_and_one_of_a_constant() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    scale = OPS.activation_scale(x, "token")
    back = OPS.dequantize(OPS.quantize(x, scale), scale, dtype=torch.float32)
    assert scale[0].item() == 0 and torch.equal(back, x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_makes_its_row_nan_and_no_other(bad: float) -> None:
    x = torch.ones(2, 3)
    x[0, 1] = bad
    scale = OPS.activation_scale(x, "token")
    back = OPS.dequantize(OPS.quantize(x, scale), scale, dtype=torch.float32)
    assert bool(back[0].isnan().any()) and torch.equal(back[1], x[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_keep_theirs(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = OPS.activation_scale(x, "token")
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert OPS.dequantize(OPS.quantize(x, scale), scale, dtype=dtype).dtype == dtype
    assert OPS.round_regular(x, 1.0).dtype == dtype


def test_outlier_columns_stay_and_do_not_widen_the_scale_of_the_others() -> None:
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    x[1, 2, 5] = -80.0
    assert OPS.outlier_columns(x, 6.0).nonzero().flatten().tolist() == [5]
    rounded = OPS.round_regular(x, 6.0)
    assert torch.equal(rounded[..., 5], x[..., 5])
    others = [c for c in range(8) if c != 5]
    regular = x[..., others]
    step = regular.abs().amax(-1, keepdim=True) / 127
    assert bool(((rounded - x)[..., others].abs() <= step / 2 + EPS * regular.abs()).all())
    plain = OPS.activation_scale(x, "token")
    assert plain[1, 2].item() > 10 * step[1, 2].item()
