"""Attention over a cache in place: against float64, in every form, with every split of the work."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.kernels import plan_cpu
from planish.kernels.attention_decode import (
    KEY_BLOCK,
    attention_decode,
    attention_decode_twin,
    key_tiles,
    keys_of,
    value_rows,
)
from torch import Tensor

pytestmark = pytest.mark.skipif(plan_cpu.why_not() is not None, reason="no C compiler here")


def cache(kv_heads: int, length: int, head: int, value_head: int) -> tuple[Tensor, Tensor]:
    """Tiles and rows with rubbish, as left by a text since forgotten, after the length."""
    capacity = (length // KEY_BLOCK + 2) * KEY_BLOCK
    tiles = key_tiles(torch.randn(kv_heads, capacity, head), capacity)
    rows = value_rows(torch.randn(kv_heads, capacity, value_head), capacity)
    return tiles, rows


def assert_as_good(given: tuple[object, ...], mask: Tensor | None = None) -> None:
    """No further from float64 than the twin is, but for another order of the same sums."""

    def widened(value: object) -> object:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value  # type: ignore[union-attr]

    wide = [widened(value) for value in given]
    truth = attention_decode_twin(*wide, mask=widened(mask))  # type: ignore[arg-type]
    twin = attention_decode_twin(*given, mask=mask)  # type: ignore[arg-type]
    got = attention_decode(*given, mask=mask)  # type: ignore[arg-type]
    allowed = (twin - truth).abs().max() + torch.finfo(torch.float32).eps * truth.abs().max()
    assert (got - truth).abs().max() <= 8 * allowed


@given(
    st.sampled_from([(1, 1), (3, 3), (9, 3), (8, 1), (5, 5), (14, 2)]),
    st.integers(1, 150),
    st.integers(1, 40),
    st.sampled_from([(8, 8), (10, 14), (64, 64), (16, 80), (3, 130)]),
    st.sampled_from([0, 1, 5, 33, 64, 500]),
    st.sampled_from([0.0, 5.0]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_form(
    heads: tuple[int, int],
    past: int,
    queries: int,
    widths: tuple[int, int],
    window: int,
    softcap: float,
    with_sinks: bool,
) -> None:
    torch.manual_seed(past * 41 + queries)
    length = past - 1 + queries
    tiles, rows = cache(heads[1], length, *widths)
    q = torch.randn(queries, heads[0], widths[0])
    sinks = torch.randn(heads[0]) if with_sinks else None
    assert_as_good((q, tiles, rows, length, widths[1], sinks, 0.3, window, softcap))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("queries", "length"), [(1, 129), (1, 700), (3, 260), (1, 64)])
@pytest.mark.parametrize("window", [0, 150])
def test_keys_are_shared_among_threads(
    threads: int, queries: int, length: int, window: int
) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tiles, rows = cache(3, length, 32, 40)
        q = torch.randn(queries, 9, 32)
        assert_as_good((q, tiles, rows, length, 40, torch.randn(9), 0.2, window, 0.0))
    finally:
        torch.set_num_threads(before)


def test_a_mask_among_the_new_tokens() -> None:
    """Two branches of a tree do not see each other."""
    torch.manual_seed(0)
    tiles, rows = cache(2, 45, 16, 16)
    mask = torch.zeros(4, 4)
    mask[2, 1] = mask[3, 1] = -torch.inf
    q = torch.randn(4, 4, 16)
    assert_as_good((q, tiles, rows, 45, 16, None, 0.25, 0, 0.0), mask)
    plain = attention_decode(q, tiles, rows, 45, 16, None, 0.25, 0, 0.0)
    seen = attention_decode(q, tiles, rows, 45, 16, None, 0.25, 0, 0.0, mask)
    assert torch.equal(plain[:2], seen[:2]) and not torch.equal(plain[2], seen[2])


def test_large_scores_neither_overflow_nor_vanish() -> None:
    tiles, rows = cache(1, 40, 8, 8)
    q = torch.randn(2, 2, 8) * 1e4
    got = attention_decode(q, tiles, rows, 40, 8, None, 1.0, 0, 0.0)
    assert_as_good((q, tiles, rows, 40, 8, None, 1.0, 0, 0.0))
    assert torch.isfinite(got).all()


def test_layouts_are_undone() -> None:
    keys = torch.randn(3, 37, 10)
    assert torch.equal(keys_of(key_tiles(keys, 64), 37), keys)
    tiles = key_tiles(keys, 64)
    assert tiles.shape == (3, 4, 10, 16) and tiles[1, 2, 7, 3] == keys[1, 35, 7]
    rows = value_rows(keys, 64)
    assert rows.shape == (3, 64, 16) and not rows[..., 10:].any() and not rows[:, 37:].any()
