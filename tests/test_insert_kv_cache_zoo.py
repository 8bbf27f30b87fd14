"""Every public decoder with a padding mask: token by token equals the whole text.

Where a hidden key's score is minus infinity, that holds at padded places too (they see nothing,
there as here). Where it is the lowest finite number, a padded place takes the mean of all values,
of which a cache has fewer: nobody reads what stands there, so only tokens' places are compared.
"""

from __future__ import annotations

import functools

import pytest
import torch
import zoo
from captured import captured, sample
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from torch import Tensor

DECODERS = [case for case in zoo.CASES if zoo.ARCHITECTURES[case[0]].inputs == "decoder"]
DECODERS.remove(("mamba", "eager"))
WINDOWED: list[tuple[str, zoo.Attention]] = [
    ("mistral", "sdpa"),
    ("gemma2", "eager"),
    ("gpt_oss", "eager"),
]
BUFFERED: list[tuple[str, zoo.Attention]] = [
    ("llama", "eager"),
    ("opt", "sdpa"),
    ("bloom", "eager"),
    ("deepseek_v3", "sdpa"),
    *WINDOWED,
]
CONTEXT = 23


@functools.cache
def raised(name: str, attention: zoo.Attention) -> Program:
    return pipeline("raise").run(captured(name, attention))


@functools.cache
def cached(name: str, attention: zoo.Attention, step: InsertKvCache) -> Program:
    return Pipeline([step], verify="facts", on_break="raise").run(raised(name, attention))


def decode(program: Program, ids: Tensor, mask: Tensor, cuts: list[int], wide: bool) -> Tensor:
    """Logits of a text that comes in pieces."""
    past = empty_past(program, len(ids))
    static = program.metadata["cache"]["form"] == "static"
    found: list[Tensor] = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        known = mask[:, :end]
        if static:
            known = torch.cat([known, mask.new_ones(len(mask), CONTEXT - end)], 1)
            past = [*past[: 2 * len(program.metadata["cache"]["layers"])], torch.tensor(start)]
        logits, *past = run(program, [ids[:, start:end], known, *past], float64=wide)
        found.append(logits)
    return torch.cat(found, 1)


def worst(found: Tensor, wanted: Tensor) -> float:
    """The greatest relative difference ||x - r|| / ||r|| of one place's logits."""
    gaps = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(gaps.max())


def check(name: str, attention: zoo.Attention, step: InsertKvCache, batch: int) -> None:
    plain, program = raised(name, attention), cached(name, attention, step)
    inputs = sample(name, attention).other_inputs(batch=batch, length=18)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert bool((mask[:, 0] == 0).any()) == (batch > 1)
    seen = mask != 0
    wanted = run(plain, [ids, mask], float64=True)[0]
    own = worst(run(plain, [ids, mask])[0][seen], wanted[seen])
    single, ragged = list(range(1, 18)), [10, 11]
    for cuts in (single, ragged):
        found = decode(program, ids, mask, cuts, wide=True)
        assert worst(found[seen], wanted[seen]) <= 1e-12
        if attention == "sdpa" and batch > 1:
            assert worst(found[~seen], wanted[~seen]) <= 1e-12
    assert worst(decode(program, ids, mask, single, wide=False)[seen], wanted[seen]) <= 4 * own


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_token_by_token_equals_the_whole_text(
    name: str, attention: zoo.Attention, batch: int
) -> None:
    check(name, attention, InsertKvCache(), batch)


@pytest.mark.parametrize(("name", "attention"), WINDOWED)
def test_a_ring_keeps_what_a_window_sees(name: str, attention: zoo.Attention) -> None:
    check(name, attention, InsertKvCache(window="ring"), 3)
    program = cached(name, attention, InsertKvCache(window="ring"))
    layers = program.metadata["cache"]["layers"]
    windows = [layer["window"] for layer in layers]
    assert zoo.WINDOW in windows
    assert [layer["kept"] for layer in layers] == [w - 1 if w else None for w in windows]
    ids = torch.full((1, 12), 5)
    present = run(program, [ids, torch.ones_like(ids), *empty_past(program, 1)])[1:]
    kept = [w - 1 if w else 12 for w in windows for _ in ("key", "value")]
    assert [value.shape[2] for value in present] == kept


@pytest.mark.parametrize(("name", "attention"), BUFFERED)
def test_buffers_equal_the_whole_text(name: str, attention: zoo.Attention) -> None:
    """Nothing of two lengths of the buffer is computed; entries beyond the text are not read."""
    step = InsertKvCache(static=CONTEXT)
    check(name, attention, step, 3)
    program = cached(name, attention, step)
    for node in program.graph.nodes:
        sizes = tuple(getattr(node.meta["val"], "shape", ())) if "val" in node.meta else ()
        assert sizes.count(CONTEXT) < 2, node


@pytest.mark.parametrize(("name", "attention"), WINDOWED)
def test_rings_of_slots(name: str, attention: zoo.Attention) -> None:
    step = InsertKvCache(static=CONTEXT, window="ring")
    check(name, attention, step, 3)
    program = cached(name, attention, step)
    slots = [layer["window"] or CONTEXT for layer in program.metadata["cache"]["layers"]]
    shapes = [node.meta["val"].shape for node in program.inputs if "past_key" in node.name]
    assert [shape[2] for shape in shapes] == slots
