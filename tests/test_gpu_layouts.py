"""Layouts of GPU kernels: pack and unpack are inverse, and bits lie where the kernels look."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.errors import UnsupportedShape, WrongOption
from planish.ir.gpu_layouts import FieldWords, TwoOfFour

WIDTHS = (2, 3, 4, 8)


def random_codes(seed: int, bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(WIDTHS), st.sampled_from([16, 32]), st.integers(1, 600), st.integers(1, 4),
    st.integers(0, 9),
)  # fmt: skip
def test_fields_are_invertible_and_dense(
    bits: int, run: int, length: int, rows: int, seed: int
) -> None:
    layout, codes = FieldWords(bits, run), random_codes(seed, bits, rows, length)
    words = layout.pack(codes)
    assert words.dtype == torch.int16
    assert words.shape == (layout.blocks(length), layout.planes, rows, run)
    assert torch.equal(layout.unpack(words, length), codes)
    padded = layout.blocks(length) * layout.block
    assert words.numel() * 16 == rows * padded * bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_one_code_sets_the_bits_that_are_documented(bits: int) -> None:
    layout = FieldWords(bits, 16)
    for column in (0, 17, layout.block - 1, layout.block + 19):
        codes = torch.zeros(3, 2 * layout.block, dtype=torch.uint8)
        codes[1, column] = (1 << bits) - 1
        words = layout.pack(codes).int() & 0xFFFF
        block, within = divmod(column, layout.block)
        field, word = divmod(within, 16)
        if bits == 3 and field == 15:
            expected = dict.fromkeys(range(3), 1 << 15)
        else:
            per_word = 16 // bits
            shift = field % per_word * bits
            expected = {field // per_word: ((1 << bits) - 1) << shift}
        for plane, value in expected.items():
            assert words[block, plane, 1, word] == value
            words[block, plane, 1, word] = 0
        assert not words.any()


def test_columns_past_the_end_hold_code_zero() -> None:
    layout = FieldWords(4, 16)
    words = layout.pack(torch.full((2, 17), 15, dtype=torch.uint8))
    assert torch.equal(layout.unpack(words, 64)[:, 17:], torch.zeros(2, 47, dtype=torch.uint8))


@pytest.mark.parametrize(("bits", "run"), [(5, 32), (16, 32), (1, 32), (4, 8), (4, 24), (4, 0)])
def test_what_has_no_layout_is_refused(bits: int, run: int) -> None:
    with pytest.raises(WrongOption):
        FieldWords(bits, run)


def two_of_four(rows: int, length: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Random weights; each four columns keep two at random, and some of those are zero."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(rows, -(-length // 4), 4, generator=generator)
    order = torch.rand(groups.shape, generator=generator).argsort(dim=-1)
    groups[order > 1] = 0
    groups[torch.rand(groups.shape, generator=generator) < 0.1] = 0
    return groups.flatten(1)[:, :length].to(dtype)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([16, 32]), st.integers(1, 600), st.integers(1, 4), st.integers(0, 9))
def test_two_of_four_is_invertible_and_half_as_long(
    run: int, length: int, rows: int, seed: int
) -> None:
    layout, weight = TwoOfFour(run), two_of_four(rows, length, seed, torch.bfloat16)
    values, places = layout.pack(weight)
    assert torch.equal(layout.unpack(values, places, length), weight)
    padded = -(-length // layout.columns) * layout.columns
    assert values.numel() * 2 == rows * padded
    assert places.numel() * 16 == rows * padded


def test_the_kept_values_lie_in_the_order_of_their_columns() -> None:
    weight = torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 3.0, 0.0]])
    values, places = TwoOfFour(16).pack(weight)
    assert values[0, :, 0, 0].tolist() == [5.0, 7.0]
    assert values[0, :, 0, 1].sum() == 3.0
    assert int(places[0, 0, 0, 0]) & 15 == 1 + 4 * 3


def test_three_of_four_are_refused() -> None:
    weight = torch.zeros(2, 8)
    weight[1, 4:7] = 1.0
    with pytest.raises(UnsupportedShape, match="more than two"):
        TwoOfFour().pack(weight)
    weight[1, 4] = 0.0
    assert torch.equal(TwoOfFour().unpack(*TwoOfFour().pack(weight), 8), weight)
