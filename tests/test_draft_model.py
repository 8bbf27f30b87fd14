"""Draft models: a cache that follows the text, greedy text as without them, drawn text too."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planish.decode_program import ProgramDecoder
from planish.draft_model import ModelDrafter, independent
from planish.ir.program import Program
from planish.passes.keep_layers import KeepLayers
from planish.passes.pipeline import Pipeline
from planish.sampling import Sampling
from planish.speculate import Statistics, speculative
from speculation import DECODERS, cached, plain_text, prompt
from test_speculate import RUNS, TableDecoder, chi_square, exact_law, plain

GREEDY = Sampling()


def first_layer(name: str, attention: zoo.Attention) -> Program:
    return Pipeline([KeepLayers(1)]).run(cached(name, attention))


@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_greedy_text_with_the_first_layer_as_draft(name: str, attention: zoo.Attention) -> None:
    ids = prompt(9)
    decoder, told = ProgramDecoder(cached(name, attention)), Statistics()
    drafter = ModelDrafter(ProgramDecoder(first_layer(name, attention)))
    run = speculative(decoder, drafter, ids, GREEDY, 24, draft_tokens=3, statistics=told)
    assert tuple(run) == plain_text(name, attention, ids, 24, GREEDY)
    assert 0 < told.accepted <= told.drafted
    if name == "llama":
        assert told.acceptance_rate < 1


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    ids, told = prompt(9), Statistics()
    decoder, drafter = (ProgramDecoder(cached("llama")) for _ in range(2))
    run = speculative(
        decoder, ModelDrafter(drafter), ids, GREEDY, 21, draft_tokens=4, statistics=told
    )
    assert tuple(run) == plain_text("llama", "sdpa", ids, 21, GREEDY)
    assert (told.acceptance_rate, told.tokens_per_step, told.steps) == (1.0, 5.0, 4)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.lists(st.integers(0, 6), max_size=5), st.integers(1, 5)),
        min_size=1,
        max_size=8,
    )
)
def test_the_cache_follows_a_text_that_changes(edits: list[tuple[int, list[int], int]]) -> None:
    """Every proposal is what a fresh draft model would propose."""
    decoder, text = TableDecoder(), [1, 2, 3]
    drafter = ModelDrafter(decoder)
    for kept, added, count in edits:
        text = [*text[: kept + 1], *added]
        found = drafter.propose(text, count).tokens
        assert found == plain(TableDecoder(), text, GREEDY, count)
        assert decoder.text == [*text, *found][:-1]


def test_it_ends_where_its_own_context_or_its_confidence_ends() -> None:
    drafter = ModelDrafter(TableDecoder(context=8))
    assert [len(drafter.propose(range(n), 5).tokens) for n in (1, 4, 6, 8, 9)] == [5, 5, 3, 1, 0]
    sure = ModelDrafter(TableDecoder(), confidence=0.999)
    assert not sure.propose([1, 2], 5).tokens


class Smoothed(TableDecoder):
    """A draft model that is partly right."""

    def row(self, text: Sequence[int]) -> torch.Tensor:
        return super().row(text) / 3 + super().row([*text, 0]) / 3


@pytest.mark.parametrize("confidence", [0.0, 0.4])
def test_drawn_text_keeps_its_distribution(confidence: float) -> None:
    counts, expected = exact_law(TableDecoder(4))
    target, small, told = TableDecoder(4), Smoothed(4), Statistics()
    for seed in range(RUNS):
        sampling = Sampling(temperature=1.0, seed=seed)
        drafter = ModelDrafter(small, sampling, confidence)
        small.rewind(0)
        run = speculative(target, drafter, [1, 2], sampling, 3, statistics=told)
        counts[tuple(run)] += 1
    assert 0.2 < told.acceptance_rate < 0.95
    assert chi_square(list(counts.values()), expected) > 0.01


def test_chance_of_drafts_is_not_the_chance_that_judges_them() -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    numbers = [
        torch.rand(4, generator=generator)
        for generator in (sampling.generator(), independent(sampling))
    ]
    assert not torch.equal(*numbers)
    again = torch.rand(4, generator=independent(sampling))
    assert torch.equal(numbers[1], again)
