"""Observers of activation ranges: what each cuts off, in fixed memory, and odd data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planish.ir.activation_grid import ActivationGrid
from planish.ir.errors import UnknownOption
from planish.ir.histogram import Histogram
from planish.ir.observer_names import OBSERVERS, make_observer
from planish.ir.observers import Observer
from torch import Tensor

OPS = torch.ops.planish


def body(tokens: int = 64, channels: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(seed))


def seen(name: str, *parts: Tensor, symmetric: bool = True, gram: Tensor | None = None) -> Observer:
    channels = parts[0].shape[-1]
    observer = make_observer(name, symmetric, lambda: torch.eye(channels) if gram is None else gram)
    for part in parts:
        observer.see(part)
    return observer


def error(observer: Observer, x: Tensor) -> float:
    grid = ActivationGrid.of(*observer.range(), observer.symmetric)
    return (grid.rounded(x) - x).square().sum().item()


@settings(max_examples=40, deadline=None)
@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3), st.booleans())
def test_a_grid_rounds_as_the_operation_does(a: float, b: float, symmetric: bool) -> None:
    grid = ActivationGrid.of(min(a, b), max(a, b), symmetric)
    x = torch.linspace(-1.2e3, 1.2e3, 301)
    scale = torch.tensor([grid.scale])
    zero = None if grid.zero is None else torch.tensor([grid.zero], dtype=torch.int32)
    back = OPS.dequantize(OPS.quantize(x, scale, zero), scale, zero, dtype=torch.float32)
    assert torch.equal(grid.rounded(x), back)
    assert bool((grid.rounded(torch.zeros(1)) == 0).all())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=60))
@example([0.0, 0.0, -1.1754943508222875e-38])
@example([-1.401298464324817e-45, 0.0, 0.0])
def test_a_histogram_counts_everything_whatever_the_order(numbers: list[float]) -> None:
    forth, back = Histogram(64), Histogram(64)
    for number in numbers:
        forth.add(torch.tensor([number]))
    for number in reversed(numbers):
        back.add(torch.tensor([number]))
    for made in (forth, back):
        assert made.total == len(numbers)
        assert made.low == min(numbers) and made.high == max(numbers)
        width = 2 * made.limit / made.bins
        middle = sorted(numbers)[(len(numbers) - 1) // 2]
        share = ((len(numbers) - 1) // 2 + 0.5) / len(numbers)
        assert abs(made.quantile(share) - middle) <= width


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_lies_within_what_was_seen(name: str, symmetric: bool) -> None:
    parts = [body(seed=s) for s in range(3)]
    low, high = seen(name, *parts, symmetric=symmetric).range()
    whole = torch.cat(parts)
    slack = 1.31 if name == "token_wise" else 1 + 1e-6  # its last search may widen the range
    assert whole.min().item() * slack <= low <= 0 <= high <= whole.max().item() * slack


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "minmax"])
def test_one_giant_costs_all_but_minmax_little(name: str) -> None:
    x = body(4096, 48)
    x[0, 3] = 60.0
    clipped = seen(name, x)
    rest = x[1:]
    assert max(abs(end) for end in clipped.range()) < 40
    # Half a step of the chosen range is far below half a step of the giant's.
    assert error(clipped, rest) < error(seen("minmax", x), rest)


def test_mse_is_the_least_of_a_fine_search() -> None:
    x = body(2000, 16) ** 3
    found = error(seen("mse", x), x)
    top = x.abs().max().item()
    best = min(
        (ActivationGrid.of(-r * top, r * top, True).rounded(x) - x).square().sum().item()
        for r in torch.linspace(0.02, 1, 400).tolist()
    )
    assert found <= 1.05 * best < error(seen("minmax", x), x)


def test_token_wise_minds_what_the_readers_make_of_it() -> None:
    """A channel of outliers that no weight reads may be cut off; one that is read may not."""
    x = body(512, 16)
    x[::2, 5] *= 60
    gram = torch.eye(16)
    blind = gram.clone()
    blind[5, 5] = 0
    wide, narrow = (seen("token_wise", x, gram=g).range()[1] for g in (gram, blind))
    assert narrow < wide / 4


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("value", [0.0, 2.5, -2.5])
def test_constant_activations_are_exact_or_nearly(name: str, value: float) -> None:
    x = torch.full((8, 4), value)
    back = ActivationGrid.of(*seen(name, x).range(), True).rounded(x)
    assert bool(((back - x).abs() <= abs(value) / 254).all())


@pytest.mark.parametrize("name", OBSERVERS)
def test_nothing_seen_is_no_range(name: str) -> None:
    assert seen(name, torch.empty(0, 4)).range() == (0.0, 0.0)


def test_unknown_observers_are_named_with_the_nearest() -> None:
    with pytest.raises(UnknownOption, match="minmax"):
        make_observer("minmx", True, lambda: torch.eye(2))
