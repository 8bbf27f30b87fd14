"""Prompt lookup: what it proposes, and that greedy text with it is the plain text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planish import trace
from planish.decode_program import ProgramDecoder
from planish.draft_ngram import NgramDrafter
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from planish.sampling import Sampling
from planish.speculate import Statistics, speculative
from speculation import DECODERS, cached, plain_text, prompt

GREEDY = Sampling()


def proposed(text: list[int], count: int, longest: int = 4, shortest: int = 2) -> list[int]:
    return list(NgramDrafter(longest, shortest, 99).propose(text, count).tokens)


def test_the_longest_agreement_wins_and_then_the_latest_place() -> None:
    assert proposed([1, 2, 3, 4, 5, 9, 3, 4, 6, 2, 3, 4], 2) == [5, 9]
    assert proposed([1, 2, 5, 5, 1, 2, 6, 6, 1, 2], 3) == [6, 6, 1]
    assert proposed([1, 2, 3, 9, 8, 3], 3) == []
    assert proposed([1, 2, 3, 9, 8, 3], 3, shortest=1) == [9, 8, 3]
    assert proposed([], 3) == proposed([1], 3) == []


def test_little_agreement_is_trusted_little() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    assert NgramDrafter().propose(text, 12).tokens == [3, 4]
    assert NgramDrafter().propose([*text, 3, 4], 12).tokens == [5, 6, 7, 8]
    assert NgramDrafter().propose([*text, 3, 4], 2).tokens == [5, 6]


def test_a_period_goes_on() -> None:
    assert proposed([7, 1, 2, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]
    assert proposed([4, 4, 4], 3) == [4, 4, 4]


def by_definition(text: list[int], count: int, longest: int, shortest: int) -> list[int]:
    for length in range(longest, shortest - 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[len(text) - length :]:
                grown = list(text)
                for step in range(count):
                    grown.append(grown[start + length + step])
                return grown[len(text) :]
    return []


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(1, 3),
    st.lists(st.integers(0, 45), max_size=6),
)
def test_the_index_finds_what_a_search_finds(
    text: list[int], count: int, longest: int, shortest: int, cuts: list[int]
) -> None:
    """Also when the text grows in pieces, or is another one than before."""
    drafter = NgramDrafter(longest, shortest, 99)
    for cut in [*cuts, len(text)]:
        found = list(drafter.propose(text[:cut], count).tokens)
        assert found == by_definition(text[:cut], count, longest, shortest)


@pytest.mark.parametrize(("name", "attention"), DECODERS)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.7, seed=3)])
def test_the_text_is_that_of_plain_decoding(
    name: str, attention: zoo.Attention, sampling: Sampling
) -> None:
    ids = (*prompt(6), *prompt(6))
    told, decoder = Statistics(), ProgramDecoder(cached(name, attention))
    drafter = NgramDrafter(4, 1, 2)
    found = speculative(decoder, drafter, ids, sampling, 40, draft_tokens=5, statistics=told)
    assert tuple(found) == plain_text(name, attention, ids, 40, sampling)
    assert told.drafted > 0
    assert told.accepted + told.steps == 39
    assert decoder.length == len(ids) + 39


@pytest.mark.slow
def test_a_real_model_repeats_a_list_in_fewer_calls(smollm2_folder: Path) -> None:
    program = trace(smollm2_folder, (torch.tensor([prompt(12)]),))
    program = Pipeline([*pipeline("raise").passes, InsertKvCache()]).run(program)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    request = "Repeat this list:\n- two water bottles\n- a rain jacket\n- a head torch\n- a knife\n"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": request}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    texts: list[list[int]] = []
    told = Statistics()
    for drafter in (NgramDrafter(1, 2), NgramDrafter()):  # the first one finds nothing
        told = Statistics()
        run = speculative(ProgramDecoder(program), drafter, ids, GREEDY, 30, statistics=told)
        texts.append(list(run))
    assert texts[0] == texts[1]
    assert told.tokens_per_step > 1.5, tokenizer.decode(texts[0])
