"""A searched grid: never worse than the range's, better on what has outliers, formats respected."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.formats import AffineInt
from planish.ir.least_squares_grid import encode_least_squares


def squares(form: AffineInt, weight: torch.Tensor, axis: int, searched: bool) -> torch.Tensor:
    encode = encode_least_squares if searched else AffineInt.encode
    gap = (encode(form, weight, axis).decode() - weight).movedim(axis, -1)
    return gap.double().square().sum(-1)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([None, 4, 5]),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_the_error_never_grows(
    bits: int, symmetric: bool, group: int | None, axis: int, seed: int
) -> None:
    form = AffineInt(bits, group, symmetric)
    weight = torch.randn(10, 20, generator=torch.Generator().manual_seed(seed)) * 3
    before, after = (squares(form, weight, axis, searched) for searched in (False, True))
    # The search compares sums in float32.
    assert bool((after <= before * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_pays(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    form = AffineInt(bits, 32, False)
    before, after = (float(squares(form, weight, -1, found).sum()) for found in (False, True))
    assert after < 0.93 * before


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_exact_stays_exact(symmetric: bool) -> None:
    weight = torch.full((6, 8), 0.75)
    weight[3] = 0.0
    form = AffineInt(4, 4, symmetric)
    assert torch.equal(form.encode(weight).decode(), weight)
    assert torch.equal(encode_least_squares(form, weight).decode(), weight)


def test_scales_keep_the_dtype_of_the_format() -> None:
    weight = torch.randn(6, 8, dtype=torch.bfloat16)
    assert encode_least_squares(AffineInt(4, 4, False), weight).scale.dtype == torch.bfloat16
    half = AffineInt(4, 4, False, torch.float16)
    assert encode_least_squares(half, weight).scale.dtype == torch.float16
