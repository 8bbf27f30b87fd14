"""Budgets: what goes is what was asked for, counted, and not a unit more than that needs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import planish
import pytest
import torch
import zoo
from captured import captured
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.channel_map import channel_map
from planish.ir.cut_channels import cut_channels
from planish.ir.errors import WrongOption, WrongOrder
from planish.ir.find_units import find_units
from planish.ir.program import Program
from planish.ir.prunable_units import Unit
from planish.passes.choose_units import Choice
from planish.passes.cut import Cut
from planish.passes.cut_budget import BudgetNotReached, counts_for_budget
from planish.passes.measure_latency import Latency
from planish.passes.pipeline import Pipeline
from planish.passes.program_costs import program_costs
from planish.recipes import pipeline


@functools.cache
def raised(name: str) -> Program:
    return pipeline("raise").run(captured(name, zoo.ARCHITECTURES[name].attentions[0]))


def batches(program: Program, name: str, count: int) -> list[list[Any]]:
    sample = zoo.build(name, zoo.ARCHITECTURES[name].attentions[0])
    return [program.flatten_inputs((), sample.other_inputs(2, 11, seed)) for seed in range(count)]


def unit(group: str, number: int) -> Unit:
    return Unit(
        "ffn", group, frozenset({hash((group, number)) % 10**9 + 1}), 1, f"{group}.{number}"
    )


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    share=st.floats(0, 0.999),
    multiple=st.integers(1, 5),
    scope=st.sampled_from(["uniform", "global"]),
    normalized=st.booleans(),
    data=st.data(),
)
def test_what_stays_is_legal_and_the_least_go(
    sizes: list[int],
    share: float,
    multiple: int,
    scope: str,
    normalized: bool,
    data: st.DataObject,
) -> None:
    units = [unit(str(place), n) for place, size in enumerate(sizes) for n in range(size)]
    score = st.floats(0, 1e30)
    scores = data.draw(st.lists(score, min_size=len(units), max_size=len(units)))
    choice = Choice(units, scores, multiple, scope, normalized)
    counts = choice.counts({"ffn": share})
    assert list(counts) == [("ffn", str(place)) for place in range(len(sizes))]
    for size, gone in zip(sizes, counts.values(), strict=True):
        kept = size - gone
        assert 1 <= kept <= size and (kept % multiple == 0 or gone == 0)
    assert sum(counts.values()) <= sum(sizes) * share + 1e-6
    dead = choice.dead(counts)
    for places in choice.groups.values():
        gone = [scores[p] for p in places if units[p].roots <= dead]
        kept_scores = [scores[p] for p in places if not units[p].roots <= dead]
        assert max(gone, default=-math.inf) <= min(kept_scores)
    if scope == "global" and multiple == 1:
        # as many go as asked, unless only the last ones of places are left
        wanted = min(int(sum(sizes) * share + 1e-9), sum(sizes) - len(sizes))
        assert sum(counts.values()) == wanted


def test_globally_the_least_of_all_places_go_and_one_of_each_stays() -> None:
    units = [unit(group, n) for group in "ab" for n in range(4)]
    scores = [5.0, 6.0, 7.0, 8.0, 0.1, 0.2, 0.3, 0.4]
    raw = Choice(units, scores, scope="global", normalized=False)
    assert raw.counts({"ffn": 0.5}) == {("ffn", "a"): 1, ("ffn", "b"): 3}
    # as parts of their layer's sum, 5/26 comes after 0.2/1 and 0.1/1, before 0.3/1
    parts = Choice(units, scores, scope="global", normalized=True)
    assert parts.counts({"ffn": 0.375}) == {("ffn", "a"): 1, ("ffn", "b"): 2}
    tiled = Choice(units, scores, 2, scope="global", normalized=False)
    assert tiled.counts({"ffn": 0.5}) == {("ffn", "a"): 2, ("ffn", "b"): 2}
    assert tiled.counts({"ffn": 0.3}) == {("ffn", "a"): 0, ("ffn", "b"): 2}


@settings(max_examples=60, deadline=None)
@given(
    budget=st.floats(0.001, 0.999),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 4)),
    ratio=st.floats(0.1, 1.0),
)
def test_a_budget_is_met_with_the_least_loss(
    budget: float, sizes: tuple[int, int], ratio: float
) -> None:
    """Many cheap units, a few dear ones: no unit of the cheap kind could stay."""
    cheap, dear = sizes
    units = [unit("a", n) for n in range(cheap)]
    units += [Unit("heads", "b", frozenset({10**10 + n}), 10, f"b.{n}") for n in range(dear)]
    whole = float(cheap + 10 * dear)

    def lost(counts: dict[Any, int]) -> float:
        return (counts["ffn", "a"] + 10 * counts["heads", "b"]) / whole

    choice = Choice(units, [1.0] * len(units))
    try:
        counts = counts_for_budget(choice, {"ffn": ratio, "heads": 1.0}, budget, lost)
    except BudgetNotReached:
        assert budget > (cheap - 1 + 10 * (dear - 1)) / whole
        return
    assert lost(counts) >= budget
    fewer = counts | {("ffn", "a"): counts["ffn", "a"] - 1}
    if fewer["ffn", "a"] >= 0:
        # what one cheap unit less would lose is under the budget, but for dear ones whose loss
        # jumps over it
        assert lost(fewer) < budget or lost(counts) - 10 / whole < budget


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
def test_costs_of_a_planned_cut_are_those_of_the_cut_program(name: str) -> None:
    program = raised(name)
    channels = channel_map(program)
    units = find_units(program, channels, ["heads", "ffn", "width"])
    costs = program_costs(program, channels, (), flops=True)
    assert costs.parameters() == program.parameter_count()
    choice = Choice(units, [float(n) for n in range(len(units))])
    dead = choice.dead(choice.counts({"heads": 0.5, "ffn": 0.3, "width": 0.25}))
    # "own", as the factors of kept LayerNorms are additional operations, though no products
    made = cut_channels(program.copy(), dead, channels=channels, norms="own")
    assert costs.parameters(dead) == made.parameter_count()
    after = program_costs(made, channel_map(made), (), flops=True).flops()
    assert costs.flops(dead) == pytest.approx(after, rel=1e-12)
    assert after < costs.flops()


def test_flops_of_a_llama_are_those_counted_by_hand() -> None:
    program = raised("llama")
    costs = program_costs(program, channel_map(program), (), flops=True)
    rows, length = program.examples[0].shape
    weights = program.weights
    matrices = [n for n in weights if len(weights.shape(n)) == 2 and "embed" not in n]
    products = 2 * rows * length * sum(weights.shape(n).numel() for n in matrices)
    attention = 2 * 2 * 2 * rows * 6 * length * length * 10  # layers, q k^T and p v
    assert costs.flops() == products + attention


@pytest.mark.parametrize("measure", ["parameters", "flops"])
@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_the_whole_program_loses_the_budget(measure: str, scope: str) -> None:
    program = raised("llama")
    step = Cut(budget=0.2, measure=measure, scope=scope, ffn=1 / 2, heads=1 / 2)
    made = Pipeline([step]).run(program)
    record = next(
        m for m in made.history.records[-1].measured if m.measure.startswith(f"{measure} that stay")
    )
    # the finest step: one FFN channel in every layer (uniform), or in one (global)
    channel = 2 * 3 * 48 / program.parameter_count()
    assert 0.8 - 2 * channel < record.after <= 0.8
    if measure == "parameters":
        assert record.after == made.parameter_count() / program.parameter_count()


def test_layers_count_towards_the_budget() -> None:
    program = raised("llama")
    given = batches(program, "llama", 1)
    made = Pipeline([Cut(budget=0.5, layers=0.5)]).run(program, calibration=given)
    assert made.parameter_count() <= 0.5 * program.parameter_count()
    assert sum(".up_proj." in name for name in made.weights) == 1


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_budgets_that_cut_nothing_or_all_are_refused(budget: float) -> None:
    with pytest.raises(WrongOption, match=r"cut\.budget cannot be") as told:
        Cut(budget=budget)
    assert "0 would cut nothing and 1 leave nothing" in str(told.value)


def test_a_budget_out_of_reach_says_how_far_one_can_go() -> None:
    with pytest.raises(BudgetNotReached, match="one unit of each place stays"):
        Pipeline([Cut(budget=0.95)]).run(raised("llama"))


def test_costs_of_calls_need_an_example() -> None:
    program = raised("llama").copy()
    program.examples = ()
    with pytest.raises(WrongOrder, match="no example inputs"):
        Pipeline([Cut(budget=0.2, measure="flops")]).run(program)


def test_a_latency_budget_is_bisected_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts weights, so that the test does not depend on the machine."""

    def counted(_: Latency, run: Callable[..., Any]) -> float:
        assert isinstance(run, torch.nn.Module)
        return 1e-3 * sum(buffer.numel() for buffer in run.buffers())

    monkeypatch.setattr(Latency, "_seconds", counted)
    program = raised("llama")
    made = Pipeline([Cut(budget=0.2, measure="latency")]).run(program)
    measured = {m.measure: m for m in made.history.records[-1].measured}
    (what,) = (m for m in measured if m.startswith("latency"))
    assert "example call" in what and "thread" in what
    assert 0.7 < measured[what].after <= 0.8 == measured[what].allowed


def test_a_smaller_program_takes_less_time() -> None:
    class Mlp(torch.nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(64, width), torch.nn.Linear(width, 48)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.relu(self.up(x)))

    x = (torch.randn(64, 64),)
    whole, part = (planish.trace(Mlp(width), x) for width in (8192, 256))
    assert Latency(whole, list(x)).share(part) < 0.5  # 32 times less work
