"""fold_constants: golden text, the size limit, and bits unchanged on real graphs."""

from __future__ import annotations

import pytest
import torch
from captured import captured
from planish.ir.capture import capture_module
from planish.ir.formats import parse_format
from planish.ir.interpret import run
from planish.ir.text import program_text
from planish.passes.fold_constants import FoldConstants
from planish.passes.pipeline import Pipeline
from torch import Tensor, nn


class Angles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.arange(3.0))

    def forward(self, x: Tensor) -> Tensor:
        table = torch.cat((self.freqs, self.freqs)).cos()
        return x * table + table.sum()


def test_what_no_input_reaches_is_computed_now() -> None:
    before = capture_module(Angles(), (torch.randn(2, 6),))
    after = Pipeline([FoldConstants()], verify="numbers", on_break="raise").run(before)
    assert program_text(after, weights=True) == (
        "%x : f32[n0, 6]\n"
        "%folded.cos = weight : f32[6]\n"
        "%folded.sum_1 = weight : f32[]\n"
        "%mul = mul(%x, %folded.cos) : f32[n0, 6]\n"
        "%add = add(%mul, %folded.sum_1) : f32[n0, 6]\n"
        "return [%add]"
    )
    assert "freqs" not in after.weights


class Blown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.row.expand(500, 8).contiguous()


def test_a_broadcast_that_would_grow_the_program_is_left_alone() -> None:
    before = capture_module(Blown(), (torch.randn(500, 8),), dynamic_shapes=({},))
    after = Pipeline([FoldConstants(max_bytes=100)]).run(before)
    (declined, *_) = after.history.records[-1].declined
    assert declined.reason == "its value has 16000 bytes, its sources only 32"


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.t() * 2)


def test_a_value_of_an_encoded_weight_is_left_alone() -> None:
    before = capture_module(Turned(), (torch.randn(5, 8),))
    before.weights["weight"] = parse_format("int4-g4-sym").encode(before.weights["weight"])
    after = Pipeline([FoldConstants()]).run(before)
    (declined, *_) = after.history.records[-1].declined
    assert declined.reason == "%weight is kept as int4-g4-sym, and would become dense"


@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("gemma", "eager")])
def test_bits_stay_on_real_graphs(name: str, attention: str) -> None:
    before = captured(name, attention)  # type: ignore[arg-type]
    after = Pipeline([FoldConstants()], verify="numbers", on_break="raise").run(before)
    flat = list(before.examples)
    assert torch.equal(run(before, flat)[0], run(after, flat)[0])
