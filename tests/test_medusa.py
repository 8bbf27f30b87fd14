"""Medusa heads: grafted, read from a file, fitted on text; greedy and seeded text unchanged."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from captured import captured
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planish.decode_program import NotADecoder, ProgramDecoder
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.write_safetensors import planned, write_safetensors
from planish.medusa import FittedHeads, MedusaDrafter, fit_heads, full_tree, likely_tree
from planish.passes.add_medusa_heads import AddMedusaHeads, CannotGraft, language_head
from planish.passes.add_tree_mask import AddTreeMask
from planish.passes.insert_kv_cache import InsertKvCache
from planish.passes.pipeline import Pipeline
from planish.sampling import Sampling
from planish.speculate import Statistics, speculative
from speculation import branching, cached, plain_text, prompt, raised
from torch import Tensor

GREEDY = Sampling()
VOCABULARY, WIDTH = 97, 48


def own_texts(count: int, length: int = 48) -> list[Tensor]:
    """What the model itself says."""
    texts = [
        (*start, *plain_text("llama", "sdpa", start, length - 2, GREEDY))
        for start in (prompt(2, seed) for seed in range(count))
    ]
    return [torch.tensor([text]) for text in texts]


@functools.cache
def fitted() -> FittedHeads:
    return fit_heads(cached("llama"), own_texts(24), heads=2, epochs=30, batch=64, ranks=4)


def with_heads(program: Program, folder: Path) -> Program:
    path = fitted().save(folder / "heads.safetensors")
    return Pipeline([AddMedusaHeads(path=str(path))], verify="facts").run(program)


def test_grafting_leaves_the_logits_as_they_are() -> None:
    plain = raised("gemma2", "eager")  # a soft cap follows the head
    grafted = Pipeline([AddMedusaHeads(heads=3)], verify="facts").run(plain)
    ids = torch.tensor([prompt(9), prompt(9, 1)])
    logits, guesses = run(grafted, [ids])
    assert torch.equal(logits, run(plain, [ids])[0])
    assert guesses.shape == (2, 9, 3, VOCABULARY)
    assert torch.equal(grafted(input_ids=ids)[1], guesses)
    assert set(grafted.weights) - set(plain.weights) == {
        f"medusa_head.{k}.0.linear.{kind}" for k in range(3) for kind in ("weight", "bias")
    }


def test_new_heads_repeat_the_decoder() -> None:
    grafted = Pipeline([AddMedusaHeads(heads=2)]).run(raised("llama"))
    logits, guesses = run(grafted, [torch.tensor([prompt(7), prompt(7, 1)])])
    for k in range(2):
        torch.testing.assert_close(guesses[:, :, k], logits)


def test_before_or_after_the_cache() -> None:
    first = Pipeline([AddMedusaHeads(), InsertKvCache()]).run(raised("llama"))
    last = Pipeline([InsertKvCache(), AddMedusaHeads()]).run(raised("llama"))
    assert first.out_spec == last.out_spec
    decoders = ProgramDecoder(first), ProgramDecoder(last)
    for decoder in decoders:
        decoder.advance(prompt(6))
        decoder.advance(prompt(3, 2))
        decoder.rewind(8)
    assert torch.equal(decoders[0].extra[0], decoders[1].extra[0])
    assert decoders[0].extra[0].shape == (2, 3, VOCABULARY)


def test_the_form_of_the_paper_is_read(tmp_path: Path) -> None:
    """Two blocks and a matrix of its own in each head, against the formula."""
    chance = torch.Generator().manual_seed(0)
    stored: dict[str, Tensor] = {}
    for k in range(2):
        for block in range(2):
            stored[f"{k}.{block}.linear.weight"] = torch.randn(WIDTH, WIDTH, generator=chance)
            stored[f"{k}.{block}.linear.bias"] = torch.randn(WIDTH, generator=chance)
        stored[f"{k}.2.weight"] = torch.randn(VOCABULARY, WIDTH, generator=chance)
    path = tmp_path / "heads.safetensors"
    write_safetensors(path, {f"medusa_head.{n}": planned(v) for n, v in stored.items()})
    grafted = Pipeline([AddMedusaHeads(path=str(path))]).run(raised("llama"))
    hidden: list[Tensor] = []
    node = language_head(grafted).args[0]

    def watch(seen: object, value: Tensor) -> None:
        if seen is node:
            hidden.append(value)

    guesses = run(grafted, [torch.tensor([prompt(7), prompt(7, 1)])], watch=watch)[1]
    for k in range(2):
        h = hidden[0]
        for block in range(2):
            weight, bias = (stored[f"{k}.{block}.linear.{kind}"] for kind in ("weight", "bias"))
            h = h + torch.nn.functional.silu(h @ weight.T + bias)
        torch.testing.assert_close(guesses[:, :, k], h @ stored[f"{k}.2.weight"].T)


def test_wrong_heads_are_refused(tmp_path: Path) -> None:
    def refusal(stored: dict[str, Tensor], program: Program) -> str:
        path = tmp_path / "heads.safetensors"
        write_safetensors(path, {name: planned(value) for name, value in stored.items()})
        with pytest.raises(CannotGraft) as caught:
            Pipeline([AddMedusaHeads(path=str(path))]).run(program)
        return caught.value.what

    square = torch.zeros(WIDTH + 1, WIDTH + 1)
    assert "does not fit the decoder" in refusal({"0.0.linear.weight": square}, raised("llama"))
    assert "heads are missing" in refusal({"1.0.linear.weight": square}, raised("llama"))
    assert refusal({"lm_head.weight": square}, raised("llama")) == (
        "lm_head.weight is no part of a Medusa head"
    )
    with pytest.raises(CannotGraft, match="not made by a linear head"):
        Pipeline([AddMedusaHeads()]).run(captured("bert"))


def test_fitted_heads_guess_and_save_calls(tmp_path: Path) -> None:
    heads = fitted()
    assert heads.accuracies.shape == (2, 4)
    assert float(heads.accuracies[0, 0]) > 0.3
    program = Pipeline([AddTreeMask()]).run(with_heads(cached("llama"), tmp_path))
    ids, told = prompt(2, 100), Statistics()
    decoder = ProgramDecoder(program)
    drafter = MedusaDrafter(decoder, likely_tree(heads.accuracies, 8))
    found = speculative(decoder, drafter, ids, GREEDY, 40, statistics=told)
    assert tuple(found) == plain_text("llama", "sdpa", ids, 40, GREEDY)
    assert told.tokens_per_step > 1.2
    sampling = Sampling(temperature=0.8, seed=4)
    again = speculative(decoder, MedusaDrafter(decoder), ids, sampling, 30)
    assert tuple(again) == plain_text("llama", "sdpa", ids, 30, sampling)


def test_heads_that_know_nothing_change_nothing() -> None:
    program = Pipeline([AddMedusaHeads(heads=3), AddTreeMask()]).run(cached("llama"))
    ids, decoder = prompt(4), ProgramDecoder(program)
    found = list(speculative(decoder, MedusaDrafter(decoder), ids, GREEDY, 20))
    assert tuple(found) == plain_text("llama", "sdpa", ids, 20, GREEDY)


def test_a_program_without_heads_is_refused() -> None:
    with pytest.raises(NotADecoder, match="no Medusa heads"):
        MedusaDrafter(ProgramDecoder(branching("llama")))


def test_trees() -> None:
    assert full_tree((2, 1)) == [(0,), (1,), (0, 0), (1, 0)]
    table = torch.tensor([[0.6, 0.2, 0.1], [0.5, 0.1, 0.1]])
    assert likely_tree(table, 5) == [(0,), (0, 0), (1,), (1, 0), (2,)]


row = st.tuples(st.integers(1, 100), st.integers(1, 100), st.integers(1, 100))


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(row, min_size=1, max_size=3), st.integers(1, 20))
def test_the_likely_tree_holds_the_likeliest_paths(rows: list[list[int]], size: int) -> None:
    table = torch.tensor([sorted(row, reverse=True) for row in rows], dtype=torch.float64) / 100

    def chance(path: tuple[int, ...]) -> float:
        return float(torch.stack([table[d, rank] for d, rank in enumerate(path)]).prod())

    paths = likely_tree(table, size)
    known = {(), *paths}
    assert all(path[:-1] in known for path in paths)
    everything = sorted(map(chance, full_tree([3] * len(rows))), reverse=True)
    wanted = everything[: len(paths)]
    assert len(paths) == min(size, len(everything))
    assert sorted(map(chance, paths), reverse=True) == pytest.approx(wanted)
