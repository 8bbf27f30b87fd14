"""The rotary kernel's twin against complex multiplication, its plan and its refusals."""

from __future__ import annotations

import pytest
import torch
from planish.kernels.rotary import cost, plan, why_not
from torch import Tensor


def angles(length: int, half: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    at = torch.arange(length)[:, None] * 0.7 ** torch.arange(half)
    return at.cos().to(dtype), at.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """A pair is a complex number, turning it a product."""
    half, x = cos.shape[-1], x.double().clone()
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    product = torch.complex(x[..., first], x[..., second]) * torch.complex(
        cos.double(), sin.double()
    )
    x[..., first], x[..., second] = product.real, product.imag
    return x


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [16, 8])
def test_pairs_are_turned_like_complex_numbers(interleaved: bool, rotary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 5, 16, generator=generator)
    k = torch.randn(2, 1, 5, 16, generator=generator)
    cos, sin = angles(5, rotary // 2)
    got = torch.ops.planish.rotary_triton(q, k, cos, sin, interleaved)
    for x, out in zip((q, k), got, strict=True):
        exact = turned(x, cos, sin, interleaved)
        assert (out.double() - exact).abs().max() <= 3 * 2.0**-24 * exact.abs().max()
        # near misses: the other pairing; a rotation the other way
        assert (out.double() - turned(x, cos, sin, not interleaved)).abs().max() > 0.1
        assert (out.double() - turned(x, cos, -sin, interleaved)).abs().max() > 0.1


def test_angles_in_float32_round_once() -> None:
    q = torch.randn(1, 2, 4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    cos, sin = angles(4, 4)
    got, empty = torch.ops.planish.rotary_triton(q, None, cos, sin)
    assert got.dtype == torch.bfloat16
    assert empty.shape == (0,)
    assert torch.equal(got, turned(q, cos, sin, False).bfloat16())


def test_heads_are_read_where_they_lie() -> None:
    fused = torch.empty(2, 7, 6, 32, dtype=torch.float16)
    q, k = fused.transpose(1, 2).split((4, 2), 1)
    cos, sin = angles(7, 16, torch.float16)
    assert why_not("sm_80", q, k, cos, sin) is None
    made = plan(q, k, cos, sin)
    (launch,) = made.launches
    assert launch.args["Q"].data_ptr() == fused.data_ptr()
    strides = [launch.args[f"q_{axis}"] for axis in ("batch", "head", "token")]
    assert strides == [7 * 6 * 32, 32, 6 * 32]
    assert [launch.args[f"cos_{axis}"] for axis in ("batch", "head", "token")] == [0, 0, 16]
    assert [out.shape for out in made.outputs] == [(2, 4, 7, 32), (2, 2, 7, 32)]
    rows = launch.constants["ROWS"]
    assert launch.grid == (-(-4 * 7 // rows) + -(-2 * 7 // rows), 2)


def test_refusals() -> None:
    q, k = torch.empty(2, 4, 7, 32), torch.empty(2, 2, 7, 32)
    cos, sin = angles(7, 16)
    assert why_not("sm_80", q, k, cos, sin) is None
    assert "float64" in str(why_not("sm_80", q.double(), None, cos, sin))
    assert "side by side" in str(why_not("sm_80", q.transpose(2, 3), None, cos, sin))
    assert "do not fit" in str(why_not("sm_80", q[..., :30], None, cos, sin))
    assert "number of heads" in str(why_not("sm_80", q, k[:1], cos, sin))
    assert "dtype" in str(why_not("sm_80", q, k.half(), cos, sin))
    assert "5 axes" in str(why_not("sm_80", q[None], None, cos, sin))
    by_head = cos.expand(4, 7, 16), sin.expand(4, 7, 16)
    assert why_not("sm_80", q, None, *by_head) is None
    assert "head to head" in str(why_not("sm_80", q, k, *by_head))


def test_cost_counts_every_byte_once() -> None:
    q = torch.empty(2, 4, 7, 32, dtype=torch.float16, device="meta")
    cos = torch.empty(7, 8, dtype=torch.float16, device="meta")
    made = cost(q, None, cos, cos)
    assert made.nbytes == 2 * 2 * q.numel() + 2 * 2 * 56
    assert made.flops == 3 * q.numel() // 2
