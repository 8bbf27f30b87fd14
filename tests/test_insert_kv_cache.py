"""insert_kv_cache: token by token equals the whole text, in ragged pieces and batches."""

from __future__ import annotations

import functools

import pytest
import torch
import zoo
from captured import captured, sample
from planish.ir.capture import capture_module
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.passes.insert_kv_cache import CannotCache, InsertKvCache, empty_past
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from torch import Tensor

DECODERS: list[tuple[str, zoo.Attention]] = [
    ("llama", "sdpa"),
    ("gemma2", "eager"),
    ("gpt2", "sdpa"),
    ("mistral", "eager"),
    ("cohere", "sdpa"),
]


@functools.cache
def raised(name: str, attention: zoo.Attention) -> Program:
    """Raised from a capture by token ids alone, without a padding mask."""
    made = sample(name, attention)
    program = capture_module(made.model, (), {"input_ids": made.kwargs["input_ids"]})
    return pipeline("raise").run(program)


def in_pieces(program: Program, ids: Tensor, cuts: list[int], wide: bool) -> Tensor:
    past: list[Tensor] = empty_past(program, ids.shape[0])
    found: list[Tensor] = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        logits, *past = run(program, [ids[:, start:end], *past], float64=wide)
        found.append(logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize(("name", "attention"), DECODERS)
def test_token_by_token_equals_the_whole_text(name: str, attention: zoo.Attention) -> None:
    plain = raised(name, attention)
    cached = Pipeline([InsertKvCache()], verify="numbers", on_break="raise").run(plain)
    for batch, length in ((1, 21), (3, 14)):
        ids = torch.randint(3, zoo.VOCABULARY, (batch, length))
        wanted = run(plain, [ids], float64=True)[0]
        for cuts in (list(range(1, length)), [5, 6, 11]):
            gap = (in_pieces(cached, ids, cuts, wide=True) - wanted).norm() / wanted.norm()
            assert gap < 1e-12, (batch, cuts)
            own = (run(plain, [ids])[0].double() - wanted).norm() / wanted.norm()
            native = (in_pieces(cached, ids, cuts, wide=False) - wanted).norm() / wanted.norm()
            assert native <= 4 * own


def test_it_is_called_with_past_and_returns_the_present() -> None:
    cached = Pipeline([InsertKvCache()]).run(raised("llama", "sdpa"))
    ids = torch.randint(3, zoo.VOCABULARY, (2, 6))
    flat = empty_past(cached, 2)
    past = tuple(zip(flat[::2], flat[1::2], strict=True))
    result, present = cached(input_ids=ids, past=past)
    assert result.logits.shape == (2, 6, zoo.VOCABULARY)
    assert [tuple(key.shape) for key, _ in present] == [(2, 2, 6, 10)] * 2
    result, present = cached(input_ids=ids[:, :1], past=present)
    assert present[0][0].shape[2] == 7
    assert "cached" in cached.facts


def test_refusals_are_one_sentence() -> None:
    def refusal(program: Program) -> str:
        with pytest.raises(CannotCache) as caught:
            Pipeline([InsertKvCache()]).run(program)
        return caught.value.what

    padded = pipeline("raise").run(captured("llama", "sdpa"))
    assert "has an explicit mask: capture without attention_mask" in refusal(padded)
    encoder = pipeline("raise").run(captured("bert", "sdpa"))
    assert "is not causal" in refusal(encoder)
    recurrent = pipeline("raise").run(captured("mamba", "eager"))
    assert "no attention was recognized" in refusal(recurrent)
