"""stream_kv_cache: the whole cache while all fits, then StreamingLLM as its paper says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import zoo
from cached_decoders import cached, gap, raised, tokens, with_cache
from captured import sample
from paper_caches import StreamCache, run_pieces
from planish.ir.errors import PlanishError, WrongOption
from planish.ir.interpret import run
from planish.ir.program_folder import load_program, save_program
from planish.passes.cached_attention import CacheRefused
from planish.passes.evict_kv_cache import EvictKvCache
from planish.passes.insert_kv_cache import empty_past
from planish.passes.measure_cache import run_in_pieces
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_kv_cache import QuantizeKvCache
from planish.passes.stream_kv_cache import StreamKvCache
from torch import Tensor

ROTARY: list[tuple[str, zoo.Attention, int, int]] = [
    ("llama", "sdpa", 3, 6),
    ("llama", "sdpa", 0, 5),
    ("mistral", "sdpa", 2, 5),
]


def test_while_all_fits_it_is_the_whole_cache() -> None:
    program = with_cache("llama", "sdpa", StreamKvCache(3, 9))
    ids = tokens(2, 13)
    for cuts in (list(range(1, 14)), [5, 12, 13], [13]):
        exact = run_in_pieces(cached("llama"), [ids], cuts, float64=True)
        assert gap(run_in_pieces(program, [ids], cuts, float64=True), exact) < 1e-12
    longer, cuts = tokens(2, 14), [*range(1, 15)]
    exact = run_in_pieces(cached("llama"), [longer], cuts, float64=True)
    found = run_in_pieces(program, [longer], cuts, float64=True)
    assert gap(found[:, :13], exact[:, :13]) < 1e-12
    assert gap(found[:, 13], exact[:, 13]) > 1e-3


@pytest.mark.parametrize(("name", "attention", "sinks", "window"), ROTARY)
def test_beyond_that_it_computes_what_the_paper_says(
    name: str, attention: zoo.Attention, sinks: int, window: int
) -> None:
    program = with_cache(name, attention, StreamKvCache(sinks, window))
    model: Any = copy.deepcopy(sample(name, attention).model)
    frequencies = model.model.rotary_emb.inv_freq
    for cuts in ([*range(1, 31)], [4, 7, *range(8, 31)]):
        reference = StreamCache(sinks=sinks, window=window, frequencies=frequencies)
        ids = tokens(2, 30)
        wanted = run_pieces(model, reference, ids, cuts, places="none")
        found = run_in_pieces(program, [ids], cuts)
        assert gap(found, wanted) < 1e-5
        exact = run_in_pieces(cached(name, attention), [ids], cuts)
        assert gap(exact[:, -1], wanted[:, -1]) > 1e-2


def test_learned_places_are_counted_in_the_cache() -> None:
    program = with_cache("gpt2", "sdpa", StreamKvCache(2, 6))
    model = copy.deepcopy(sample("gpt2", "sdpa").model)
    ids, cuts = tokens(2, 70), [5, *range(6, 71)]  # more than the table of 64 places
    wanted = run_pieces(model, StreamCache(sinks=2, window=6), ids, cuts, places="cache")
    assert gap(run_in_pieces(program, [ids], cuts), wanted) < 1e-5


def test_biases_by_distance_are_counted_in_the_cache() -> None:
    """ALiBi by the place in the cache is what the plain cached program does with a cut cache."""
    whole = cached("bloom", "eager")
    program = with_cache("bloom", "eager", StreamKvCache(3, 5))
    ids, past = tokens(2, 17), empty_past(whole, 2)
    pieces: list[Tensor] = []
    cuts = [6, 9, *range(10, 18)]
    for start, end in zip([0, *cuts], cuts, strict=False):
        logits, *past = run(whole, [ids[:, start:end], *past])
        pieces.append(logits)
        if past[0].shape[2] > 8:
            past = [torch.cat([part[:, :, :3], part[:, :, -5:]], 2) for part in past]
    found = run_in_pieces(program, [ids], cuts)
    assert torch.equal(found, torch.cat(pieces, 1))
    exact = run_in_pieces(whole, [ids], cuts)
    assert gap(found[:, -1], exact[:, -1]) > 1e-3


def test_the_cache_keeps_its_size() -> None:
    program = with_cache("llama", "sdpa", StreamKvCache(3, 6))
    past = empty_past(program, 1)
    sizes: list[int] = []
    for count in (2, 1, 9, 1, 3):
        _, *past = run(program, [tokens(1, count), *past])
        sizes.append(past[0].shape[2])
        assert all(part.shape[2] == sizes[-1] for part in past)
    assert sizes == [2, 3, 9, 9, 9]
    policy = {"name": "stream", "sinks": 3, "window": 6}
    assert program.metadata["cache"]["context"] is None
    assert program.metadata["cache"]["policy"] == policy
    assert program.metadata["cache"]["rewind"] is False


def test_the_history_says_what_it_loses() -> None:
    measured = with_cache("llama", "sdpa", StreamKvCache(3, 6)).history.records[-1].measured
    fits, loss = measured
    assert fits.after < 1e-12 and "while the text fits" in fits.measure
    assert 0 < loss.after < 20 and "3 + 6 kept" in loss.where


def test_golden_text() -> None:
    lines = str(with_cache("llama", "sdpa", StreamKvCache(3, 6))).splitlines()
    kept = "%model.layers.1.self_attn.cat = cat([%past_key_1, %model.layers.1.self_attn.transpose_1"
    assert sum(line.startswith(kept) for line in lines) == 1
    turned = next(line for line in lines if line.startswith("%model.layers.1.self_attn.rotary_1"))
    assert "rotary(%model.layers.1.self_attn.cat, " in turned and "n1 + n2, 10]" in turned


def test_a_saved_program_is_the_same(tmp_path: Any) -> None:
    program = with_cache("llama", "sdpa", StreamKvCache(3, 6))
    save_program(program, tmp_path / "p")
    ids, cuts = tokens(2, 17, seed=3), [9, 11, 17]
    again = run_in_pieces(load_program(tmp_path / "p"), [ids], cuts)
    assert torch.equal(again, run_in_pieces(program, [ids], cuts))


def test_refusals_are_one_sentence() -> None:
    def refusal(name: str, attention: zoo.Attention, *steps: Any) -> PlanishError:
        with pytest.raises(PlanishError) as caught:
            Pipeline(list(steps)).run(cached(name, attention))
        return caught.value

    windowed = refusal("gemma2", "eager", StreamKvCache(2, 6))
    assert isinstance(windowed, CacheRefused)
    assert "sees 8 tokens back, which hides the first ones of a cache of 2 + 6" in windowed.what
    split = refusal("deepseek_v3", "sdpa", StreamKvCache(2, 6))
    assert "takes its place in the text from %rotary" in split.what
    assert "which is not one rotary embedding of the whole keys" in split.what
    short = refusal("gpt2", "sdpa", StreamKvCache(4, 60))
    assert "would hold 4 + 60 tokens before a new one, and the model knows 64 places" in short.what
    coded = refusal("llama", "sdpa", QuantizeKvCache(), StreamKvCache())
    assert "is not joined with new keys" in coded.what
    after = refusal("llama", "sdpa", StreamKvCache(), EvictKvCache())
    assert isinstance(after, CacheRefused)
    with pytest.raises(PlanishError, match="requires 'cached'"):
        Pipeline([StreamKvCache()]).run(raised("llama"))
    for wrong in ({"sinks": -1}, {"window": 0}):
        with pytest.raises(WrongOption, match="option stream_kv_cache"):
            StreamKvCache(**wrong)
