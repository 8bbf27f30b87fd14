"""evict_kv_cache: the whole cache while all fits, then H2O as its paper says, token by token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from cached_decoders import cached, gap, raised, tokens, with_cache
from captured import sample
from hypothesis import given, settings
from hypothesis import strategies as st
from paper_caches import HeavyHitterCache, run_pieces
from paper_caches import weights as plain_weights
from planish.ir.errors import PlanishError, WrongOption
from planish.ir.interpret import run
from planish.ir.program_folder import load_program, save_program
from planish.passes.cached_attention import CacheRefused
from planish.passes.evict_kv_cache import EvictKvCache
from planish.passes.insert_kv_cache import empty_past
from planish.passes.measure_cache import run_in_pieces
from planish.passes.pipeline import Pipeline

OPS = torch.ops.planish


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 7), st.integers(0, 5))
def test_heavy_hitters_are_the_latest_and_the_most_attended(
    data: st.DataObject, recent: int, heavy: int
) -> None:
    score = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])  # with ties
    rows = data.draw(st.lists(st.lists(score, min_size=9, max_size=9), min_size=2, max_size=2))
    count = data.draw(st.integers(1, 9))
    mass = torch.tensor(rows)[None, :, :count]
    found = OPS.heavy_hitters(mass, recent, heavy)
    for row, places in zip(mass[0].tolist(), found[0].tolist(), strict=True):
        left = list(range(count))
        while len(left) > recent + heavy:
            older = left[: len(left) - recent]
            left.remove(min(older, key=lambda i: (row[i], -i)))
        assert places == left


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_attention_mass_is_the_sum_of_the_weights(queries: int, softcap: float) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, queries, 5, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 3, 7, 5, generator=generator, dtype=torch.float64)
    mass = OPS.attention_mass(q, k, scale=0.4, softcap=softcap)
    paid = plain_weights(q, k, scale=0.4, softcap=softcap)
    wanted = torch.stack([paid[:, 2 * h : 2 * h + 2].sum((1, 2)) for h in range(3)], 1)
    assert torch.allclose(mass, wanted, rtol=1e-12, atol=0)
    assert torch.allclose(mass.sum(-1), torch.tensor(2.0 * queries, dtype=torch.float64))
    sinks = torch.zeros(6, dtype=torch.float64)
    assert bool((OPS.attention_mass(q, k, sinks, scale=0.4).sum(-1) < 2 * queries).all())


def test_while_all_fits_it_is_the_whole_cache() -> None:
    program = with_cache("llama", "sdpa", EvictKvCache(8, 4))
    ids = tokens(2, 13)
    for cuts in (list(range(1, 14)), [5, 12, 13], [13]):
        exact = run_in_pieces(cached("llama"), [ids], cuts, float64=True)
        assert gap(run_in_pieces(program, [ids], cuts, float64=True), exact) < 1e-12


@pytest.mark.parametrize(("name", "cut"), [("llama", 11), ("gpt2", 14), ("cohere", 3)])
def test_beyond_that_it_computes_what_the_paper_says(name: str, cut: int) -> None:
    """A prompt of several lengths, then token by token; grouped queries in llama and cohere."""
    program = with_cache(name, "sdpa", EvictKvCache(4, 3))
    model = copy.deepcopy(sample(name, "sdpa").model)
    for seed, cuts in ((0, [*range(1, 25)]), (1, [cut, *range(cut + 1, 25)])):
        ids = tokens(2, 24, seed)
        reference = HeavyHitterCache(heavy=3, recent=4)
        wanted = run_pieces(model, reference, ids, cuts)
        assert reference.evicted == 2 * 2 * cached(name).inputs[-1].meta["val"].shape[1] * 17
        assert gap(run_in_pieces(program, [ids], cuts), wanted) < 1e-5
        exact = run_in_pieces(cached(name), [ids], cuts)
        assert gap(exact[:, -1], wanted[:, -1]) > 1e-3


def test_the_cache_keeps_its_size_and_the_text_its_length() -> None:
    program = with_cache("llama", "sdpa", EvictKvCache(4, 3))
    flat = empty_past(program, 2)
    past: Any = (tuple(flat[:3]), tuple(flat[3:6]), (flat[6],))
    lengths: list[tuple[int, int]] = []
    for count in (5, 1, 9, 1):
        result, past = program(input_ids=tokens(2, count), past=past)
        assert result.logits.shape == (2, count, zoo.VOCABULARY)
        key, value, score = past[1]
        assert key.shape[:3] == value.shape[:3] == score.shape
        assert key.shape[:2] == (2, 2)
        lengths.append((key.shape[2], int(past[2][0])))
    assert lengths == [(5, 5), (6, 6), (7, 15), (7, 16)]
    policy = {"name": "evict", "recent": 4, "heavy": 3}
    assert program.metadata["cache"]["policy"] == policy


def test_the_scores_of_a_prompt_are_those_of_all_its_queries() -> None:
    """Six query heads in two groups pay 1 for each of five queries."""
    program = with_cache("llama", "sdpa", EvictKvCache(9, 3))
    _, *present = run(program, [tokens(2, 5), *empty_past(program, 2)])
    assert torch.allclose(present[2].sum(-1), torch.full((2, 2), 15.0))


def test_the_history_says_what_it_loses() -> None:
    (loss,) = with_cache("llama", "sdpa", EvictKvCache(4, 3)).history.records[-1].measured
    assert 0 < loss.after < 20 < loss.before and "3 + 4 kept" in loss.where


def test_a_saved_program_is_the_same(tmp_path: Any) -> None:
    program = with_cache("llama", "sdpa", EvictKvCache(4, 3))
    save_program(program, tmp_path / "p")
    ids, cuts = tokens(2, 17, seed=3), [9, 11, 17]
    again = run_in_pieces(load_program(tmp_path / "p"), [ids], cuts)
    assert torch.equal(again, run_in_pieces(program, [ids], cuts))


def test_refusals_are_one_sentence() -> None:
    def refusal(name: str, attention: zoo.Attention) -> PlanishError:
        with pytest.raises(CacheRefused) as caught:
            Pipeline([EvictKvCache(4, 3)]).run(cached(name, attention))
        return caught.value

    assert (
        "reads a mask by place, and evicted tokens leave no place" in refusal("bloom", "eager").what
    )
    windowed = refusal("mistral", "sdpa").what
    assert "sees 8 tokens back in the text, which a cache with gaps does not tell" in windowed
    with pytest.raises(PlanishError, match="requires 'cached'"):
        Pipeline([EvictKvCache()]).run(raised("llama"))
    for wrong in ({"recent": 0}, {"heavy": -1}):
        with pytest.raises(WrongOption, match="option evict_kv_cache"):
            EvictKvCache(**wrong)
