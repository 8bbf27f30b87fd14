"""The allocation of formats under a budget: against every possible choice, and at full size."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.search_allocate import (
    BudgetTooSmall,
    Choices,
    allocate,
    cheapest_within,
    frontier,
)

numbers = st.integers(1, 40).map(float)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Choices], float]:
    classes: list[Choices] = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 4))
        sizes = draw(st.lists(numbers, min_size=count, max_size=count))
        costs = draw(st.lists(numbers, min_size=count, max_size=count))
        classes.append(Choices(sizes, costs))
    least, most = (sum(end(c.sizes) for c in classes) for end in (min, max))
    return classes, draw(st.integers(int(least), int(most))) * 1.0


def every(classes: list[Choices]) -> list[tuple[float, float]]:
    """Size and cost of all choices."""
    places = itertools.product(*(range(len(c.sizes)) for c in classes))
    return [
        (
            sum(c.sizes[i] for c, i in zip(classes, chosen, strict=True)),
            sum(c.costs[i] for c, i in zip(classes, chosen, strict=True)),
        )
        for chosen in places
    ]


@given(problems())
@settings(max_examples=300, deadline=None)
def test_the_allocation_is_the_best_of_all(problem: tuple[list[Choices], float]) -> None:
    classes, budget = problem
    found = allocate(classes, budget)
    assert found.exact
    assert found.size <= budget
    assert found.cost == min(cost for size, cost in every(classes) if size <= budget)
    pairs = list(zip(classes, found.chosen, strict=True))
    assert found.size == sum(c.sizes[i] for c, i in pairs)
    assert found.cost == sum(c.costs[i] for c, i in pairs)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_the_smallest_within_a_cost(problem: tuple[list[Choices], float]) -> None:
    classes, budget = problem
    highest = allocate(classes, budget).cost
    found = cheapest_within(classes, highest)
    assert found.cost <= highest
    assert found.size == min(size for size, cost in every(classes) if cost <= highest)


@given(problems())
@settings(max_examples=100, deadline=None)
def test_no_allocation_is_below_the_frontier(problem: tuple[list[Choices], float]) -> None:
    classes, _ = problem
    for size, cost in frontier(classes, points=7):
        assert cost <= min(c for s, c in every(classes) if s <= size * (1 + 1e-9)) * (1 + 1e-9)


def test_a_budget_below_the_least_says_the_least() -> None:
    classes = [Choices([30.0, 40.0], [2.0, 1.0]), Choices([12.5], [5.0])]
    with pytest.raises(BudgetTooSmall, match=r"at least 42\.5"):
        allocate(classes, 42.0)


def test_a_model_of_two_hundred_layers_is_solved() -> None:
    draw = torch.Generator().manual_seed(5)
    bits = torch.tensor([3.3, 4.1, 4.3, 4.6, 5.3, 6.3, 8.3], dtype=torch.float64)
    classes: list[Choices] = []
    for _ in range(200):
        count = float(torch.randint(1, 9, (), generator=draw)) * 36864
        weight = float(torch.rand((), generator=draw).pow(4)) * 0.01
        noise = 1 + 0.2 * torch.rand(7, generator=draw, dtype=torch.float64)
        costs = weight * 4 ** (3 - bits) * noise
        classes.append(Choices((bits * count).tolist(), costs.tolist()))
    total = sum(choices.sizes[0] for choices in classes) / 3.3
    found = allocate(classes, 4.5 * total)
    assert found.exact
    assert found.size <= 4.5 * total
    uniform = sum(choices.costs[3] for choices in classes)
    assert found.cost < 0.8 * uniform
