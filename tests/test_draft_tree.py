"""Trees: the mask, the branches of a program, drafters of trees, greedy and drawn text."""

from __future__ import annotations

import pytest
import torch
import zoo
from captured import captured
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planish.decode_program import NotADecoder, ProgramDecoder, tree_mask
from planish.draft_tree import ModelTreeDrafter, NgramTreeDrafter, merged
from planish.ir.errors import WrongInput
from planish.ir.text import program_diff
from planish.passes.add_tree_mask import AddTreeMask, CannotBranch
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.keep_layers import KeepLayers
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from planish.sampling import Sampling
from planish.speculate import Statistics, speculative
from speculation import DECODERS, branching, cached, plain_text, prompt
from test_draft_model import Smoothed
from test_speculate import RUNS, TreeTableDecoder, chi_square, exact_law

GREEDY = Sampling()


def test_a_mask_shows_each_token_its_ancestors() -> None:
    mask, depths = tree_mask([-1, 0, 0, 2, -1])
    assert depths.tolist() == [0, 1, 1, 2, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    with pytest.raises(WrongInput, match="the parent of token 1 to be from -1 to 0"):
        tree_mask([-1, 1])


trees = st.integers(1, 7).flatmap(
    lambda n: st.tuples(*(st.integers(-1, place - 1) for place in range(n)))
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(DECODERS), st.integers(0, 21), trees, st.randoms(use_true_random=False))
def test_a_branch_gets_what_it_would_get_alone(
    model: tuple[str, zoo.Attention], begun: int, parents: tuple[int, ...], chance: object
) -> None:
    """And after keep_branch the text goes on from that branch. The longest texts leave a window."""
    text, found = list(prompt(begun)), list(prompt(len(parents), 5))
    decoder = ProgramDecoder(branching(*model))
    if text:
        decoder.advance(text)
    rows = decoder.advance_tree(found, parents)
    for place in range(len(parents)):
        path = [place]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        alone = ProgramDecoder(cached(*model))
        wanted = alone.advance([*text, *(found[i] for i in path)])[-1]
        torch.testing.assert_close(rows[place], wanted, rtol=1e-4, atol=1e-5)
    decoder.keep_branch(path)
    assert decoder.length == len(text) + len(path)
    torch.testing.assert_close(decoder.advance([9]), alone.advance([9]), rtol=1e-4, atol=1e-5)


def test_rewind_forgets_a_tree() -> None:
    decoder, plain = (ProgramDecoder(branching("llama")) for _ in range(2))
    for one in (decoder, plain):
        one.advance(prompt(5))
    decoder.advance_tree([5, 6, 7], [-1, 0, 0])
    assert decoder.length == 8
    decoder.rewind(4)
    plain.rewind(4)
    assert torch.equal(decoder.advance([11, 12]), plain.advance([11, 12]))


def test_the_program_before_and_after() -> None:
    text = program_diff(cached("gpt2"), branching("gpt2"), context=0)
    assert "+%tree_mask : bool[n1, n1]" in text
    assert "+%tree_positions : i64[n1]" in text
    assert "-%transformer.arange = arange" in text
    assert "causal=True" not in "\n".join(x for x in text.splitlines() if x.startswith("+"))
    windows = str(branching("gemma2", "eager"))
    assert windows.count("gt(") == 1  # one mask for all layers with that window


def test_refusals_are_one_sentence() -> None:
    with pytest.raises(CannotBranch, match="has an explicit mask, which may count places"):
        program = pipeline("raise").run(captured("llama"))
        Pipeline([InsertKvCache(), AddTreeMask()]).run(program)
    with pytest.raises(NotADecoder, match="cannot look at a tree of tokens"):
        ProgramDecoder(cached("llama")).advance_tree([1], [-1])


def test_equal_beginnings_are_one_branch() -> None:
    draft = merged([[1, 2, 3], [1, 2, 4], [5]])
    assert (draft.tokens, draft.parents) == ([1, 2, 3, 4, 5], [-1, 0, 1, 1, -1])


def test_lookup_proposes_what_followed_in_several_places() -> None:
    drafter = NgramTreeDrafter(2, 2, 1)
    draft = drafter.propose([1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2], 2)
    assert (draft.tokens, draft.parents) == ([3, 1, 4, 1], [-1, 0, -1, 2])


@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_greedy_text_with_trees(name: str, attention: zoo.Attention) -> None:
    ids = (*prompt(6), *prompt(6))
    wanted = plain_text(name, attention, ids, 24, GREEDY)
    first = Pipeline([KeepLayers(1)]).run(cached(name, attention))
    for drafter in (
        NgramTreeDrafter(3, 3, 1, 2),
        ModelTreeDrafter(ProgramDecoder(first), widths=(3, 2, 1)),
    ):
        told, decoder = Statistics(), ProgramDecoder(branching(name, attention))
        run = speculative(decoder, drafter, ids, GREEDY, 24, draft_tokens=4, statistics=told)
        assert tuple(run) == wanted
        assert told.accepted > 0
        assert decoder.length == len(ids) + 23


def test_wider_trees_save_calls() -> None:
    def calls(widths: tuple[int, ...]) -> int:
        told, target = Statistics(), TreeTableDecoder()
        drafter = ModelTreeDrafter(Smoothed(), widths)
        list(speculative(target, drafter, [1, 2], GREEDY, 60, statistics=told))
        return told.steps

    assert calls((3, 3, 3)) < calls((1, 1, 1)) < 59


@pytest.mark.parametrize("widths", [(2, 2), (3, 1, 1)])
def test_drawn_text_keeps_its_distribution(widths: tuple[int, ...]) -> None:
    counts, expected = exact_law(TreeTableDecoder(4))
    target, small, told = TreeTableDecoder(4), Smoothed(4), Statistics()
    for seed in range(RUNS):
        sampling = Sampling(temperature=1.0, seed=seed)
        small.rewind(0)
        drafter = ModelTreeDrafter(small, widths, sampling)
        counts[tuple(speculative(target, drafter, [1, 2], sampling, 3, statistics=told))] += 1
    assert 1.5 < told.tokens_per_step < 3
    assert chi_square(list(counts.values()), expected) > 0.01
