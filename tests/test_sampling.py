"""Sampling: the definitions of transformers' processors, greedy, seeds, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.errors import WrongOption
from planish.sampling import BadLogits, Sampling, draw
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

ROWS, VOCABULARY = 5, 211


def logits(seed: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, VOCABULARY, generator=made, dtype=torch.float64) * 3


def theirs(sampling: Sampling, scores: torch.Tensor, context: list[int]) -> torch.Tensor:
    """The same settings as transformers' own processors, in the order of its `generate`."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    ids = torch.tensor([context] * ROWS, dtype=torch.long)
    return steps(ids, scores.clone()).softmax(-1)


SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.3, top_k=7),
    Sampling(temperature=1.0, top_k=VOCABULARY + 3),
    Sampling(temperature=1.0, top_p=0.4),
    Sampling(temperature=0.9, top_p=0.95),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.0, repetition_penalty=1.4),
    Sampling(temperature=1.0, repetition_penalty=0.8),
    Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.1),
]


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_probabilities_are_those_of_transformers(sampling: Sampling) -> None:
    for seed in range(20):
        context = torch.randint(VOCABULARY, (9,)).tolist()
        found = sampling.probabilities(logits(seed), context)
        wanted = theirs(sampling, logits(seed), context)
        assert torch.equal(found > 0, wanted > 0)
        # both are float64 and differ by the order of a shift and a division alone
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_a_nucleus_wider_than_the_first_look() -> None:
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for top_p in (0.01, 0.5, 0.999):
        found = Sampling(temperature=1.0, top_p=top_p).probabilities(scores)
        wanted = TopPLogitsWarper(top_p)(torch.zeros(3, 0, dtype=torch.long), scores).softmax(-1)
        assert torch.equal(found > 0, wanted > 0)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_greedy_is_the_first_of_the_largest() -> None:
    scores = torch.tensor([[1.0, 5.0, 5.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    greedy = Sampling()
    assert greedy.greedy
    assert greedy.probabilities(scores).tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    assert [greedy.choose(row, [], torch.Generator()) for row in scores] == [1, 0]


def test_the_penalty_moves_the_greedy_choice_away_from_the_text() -> None:
    scores = torch.tensor([[3.0, 2.9, -1.0]])
    penalized = Sampling(repetition_penalty=1.2)
    assert penalized.probabilities(scores, [0, 0, 2]).argmax() == 1
    assert penalized.choose(scores[0], [0, 0, 2], torch.Generator()) == 1
    assert penalized.choose(scores[0], [1, 5], torch.Generator()) == 0  # 5 is beyond the logits


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 300),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_a_distribution_that_keeps_the_likeliest(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p)
    found = sampling.probabilities(logits(seed))
    torch.testing.assert_close(found.sum(-1), torch.ones(ROWS, dtype=torch.float64))
    assert torch.equal(found.argmax(-1), logits(seed).argmax(-1))
    assert bool((found >= 0).all())
    if top_k:
        assert bool(((found > 0).sum(-1) <= top_k).all())


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    chance = torch.Generator().manual_seed(3)
    count = 20000
    drawn = torch.tensor([draw(probabilities, chance) for _ in range(count)])
    found = drawn.bincount(minlength=6).double()
    assert found[probabilities == 0].sum() == 0
    wanted = probabilities[probabilities > 0].double() * count
    square = ((found[probabilities > 0] - wanted) ** 2 / wanted).sum()
    assert square < 13.8  # chi-square of 2 degrees of freedom exceeds it once in a thousand


def test_a_seed_is_a_text() -> None:
    flat = torch.zeros(VOCABULARY)

    def text(seed: int | None) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        chance = sampling.generator()
        return [sampling.choose(flat, [], chance) for _ in range(12)]

    assert text(5) == text(5)
    assert text(5) != text(6)
    assert text(None) != text(None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
    ],
)
def test_values_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(WrongOption, match=f"{name} cannot be"):
        Sampling(**{name: value})  # pyright: ignore[reportArgumentType]


def test_logits_without_a_largest_are_refused() -> None:
    for bad in (math.nan, math.inf):
        scores = torch.tensor([[1.0, bad, 0.0]])
        for sampling in (Sampling(), Sampling(temperature=1.0)):
            with pytest.raises(BadLogits, match="name no next token"):
                sampling.probabilities(scores)
            with pytest.raises(BadLogits):
                sampling.choose(scores[0], [], torch.Generator())
