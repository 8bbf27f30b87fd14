"""keep_last_logits: the last rows as before, everything before the last attention untouched."""

from __future__ import annotations

import pytest
import torch
import zoo
from captured import captured, sample
from planish.ir.capture import capture_module
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.insert_kv_cache import InsertKvCache, empty_past
from planish.passes.keep_last_logits import KeepLastLogits
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline
from torch import Tensor, nn

FREE = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 14)
        self.down = nn.Linear(14, 6)
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x + x.cumsum(1)
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        return 3 * torch.tanh(self.head(h) / 3)


def tail() -> Program:
    torch.manual_seed(0)
    return capture_module(Tail(), (torch.randn(2, 5, 6),), dynamic_shapes=FREE)


def apply(program: Program, count: int) -> Program:
    return Pipeline([KeepLastLogits(count)], verify="facts", on_break="raise").run(program)


def reasons(program: Program) -> str:
    return "; ".join(d.reason for record in program.history.records for d in record.declined)


def test_the_text_shows_one_slice_where_places_mix_last() -> None:
    assert program_text(apply(tail(), 1)).strip() == GOLDEN.strip()


GOLDEN = """
%x : f32[n0, n1, 6]
%cumsum = cumsum(%x, 1) : f32[n0, n1, 6]
%slice = slice(%x, 1, -1, 9223372036854775807) : f32[n0, 1, 6]
%slice_1 = slice(%cumsum, 1, -1, 9223372036854775807) : f32[n0, 1, 6]
%add = add(%slice, %slice_1) : f32[n0, 1, 6]
%norm = layer_norm(%add, [6], %norm.weight, %norm.bias, 1e-05, False) : f32[n0, 1, 6]
%up = linear(%norm, %up.weight, %up.bias) : f32[n0, 1, 14]
%relu = relu(%up) : f32[n0, 1, 14]
%down = linear(%relu, %down.weight, %down.bias) : f32[n0, 1, 6]
%add_1 = add(%add, %down) : f32[n0, 1, 6]
%head = linear(%add_1, %head.weight) : f32[n0, 1, 11]
%div = div(%head, 3) : f32[n0, 1, 11]
%tanh = tanh(%div) : f32[n0, 1, 11]
%mul = mul(%tanh, 3) : f32[n0, 1, 11]
return [%mul]
"""


@pytest.mark.parametrize("count", [1, 4, 16])
def test_rows_kept_are_the_last(count: int) -> None:
    whole = tail()
    cut = apply(whole, count)
    for length in (1, 3, 7, 20):
        x = torch.randn(3, length, 6)
        (wanted,), (found,) = run(whole, [x], float64=True), run(cut, [x], float64=True)
        assert found.shape == (3, min(count, length), 11)
        torch.testing.assert_close(found, wanted[:, -count:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "cohere"])
def test_decoders_with_a_cache(name: str) -> None:
    made = sample(name, "eager")
    plain = pipeline("exact").run(
        capture_module(made.model, (), {"input_ids": made.kwargs["input_ids"]})
    )
    cached = Pipeline([InsertKvCache()]).run(plain)
    cut = apply(cached, 2)
    ids = torch.randint(3, zoo.VOCABULARY, (3, 9))
    past = empty_past(cached, 3)
    wanted, found = run(cached, [ids, *past]), run(cut, [ids, *past])
    assert found[0].shape == (3, 2, zoo.VOCABULARY)
    torch.testing.assert_close(found[0], wanted[0][:, -2:], rtol=1e-5, atol=1e-6)
    for a, b in zip(found[1:], wanted[1:], strict=True):
        assert torch.equal(a, b)


def test_the_work_of_the_last_layer_shrinks_too() -> None:
    plain = pipeline("exact").run(captured("llama", "sdpa"))
    cut = apply(plain, 1)
    rows = [n.meta["val"].shape[1] for n in cut.graph.nodes if "linear" in str(n.target)]
    assert rows[-4:] == [1, 1, 1, 1]  # attention's output, gate and up, down, head
    assert rows[0] != 1


def test_what_has_no_logits_is_left_alone() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    result = apply(capture_module(Pooled(), (torch.randn(2, 5, 6),), dynamic_shapes=FREE), 1)
    assert "no result has the form" in reasons(result)

    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    result = apply(capture_module(Mixed(), (torch.randn(2, 5, 6),), dynamic_shapes=FREE), 1)
    assert "is not computed position by position" in reasons(result)
