"""fuse_bottleneck: a bottleneck adapter joined with its neighbours, golden text and near misses."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.capture import capture_module
from planish.ir.formats import AffineInt
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.canonicalize import Canonicalize
from planish.passes.fuse_bottleneck import FuseBottleneck
from planish.passes.pipeline import Pipeline
from torch import Tensor, nn


class Adapted(nn.Module):
    """z + s up(relu(down(z))) with z = W x + b: 6 -> 10, three in between."""

    def __init__(self, inner: int = 6, bias: bool = True, factor: float = 0.5) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, 10, bias=bias)
        self.down, self.up = nn.Linear(10, 3, bias=bias), nn.Linear(3, 10, bias=bias)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        z = self.dense(x)
        return z + self.up(torch.relu(self.down(z))) * self.factor


def fuse(model: nn.Module, width: int = 6) -> Program:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    program = capture_module(model, (torch.randn(2, 4, width),))
    passes = [Canonicalize(), FuseBottleneck()]
    return Pipeline(passes, verify="numbers", on_break="raise").run(program)


def reasons(program: Program) -> list[str]:
    return [entry.reason for entry in program.history.records[-1].declined]


def test_golden_text() -> None:
    model = Adapted()
    after = fuse(model)
    assert program_text(after, weights=True) == (
        "%x : f32[n0, 4, 6]\n"
        "%up.weight = weight : f32[10, 3]\n"
        "%up.bias = weight : f32[10]\n"
        "%dense+down.weight = weight : f32[13, 6]\n"
        "%dense+down.bias = weight : f32[13]\n"
        "%dense.linear = linear(%x, %dense+down.weight, %dense+down.bias) : f32[n0, 4, 13]\n"
        "%dense.slice = slice(%dense.linear, -1, 0, 10) : f32[n0, 4, 10]\n"
        "%down = slice(%dense.linear, -1, 10, 13) : f32[n0, 4, 3]\n"
        "%relu = relu(%down) : f32[n0, 4, 3]\n"
        "%up = linear(%relu, %up.weight, %up.bias) : f32[n0, 4, 10]\n"
        "%add = add(%dense.slice, %up) : f32[n0, 4, 10]\n"
        "return [%add]"
    )
    assert torch.equal(after.weights["up.weight"], model.up.weight / 2)


@given(st.integers(1, 10), st.booleans(), st.sampled_from([1.0, -3.0, 0.1, 0.0]))
@settings(max_examples=12, deadline=None)
def test_numbers(inner: int, bias: bool, factor: float) -> None:
    """Judged by the pipeline against float64, with and without biases."""
    after = fuse(Adapted(inner, bias, factor), inner)
    assert sum("linear" in str(n.target) for n in after.graph.nodes) == 2


class Normed(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.dense(x))
        return z + self.up(torch.relu(self.down(z)))


class Twice(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.linear(torch.tanh(x), self.dense.weight)


class Wide(nn.Module):
    """An MLP is no bottleneck, and one without a parallel branch is left alone too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.a(x))))


def test_near_misses_say_why() -> None:
    assert reasons(fuse(Adapted(inner=11, factor=1.0), 11)) == [
        "joined, it would multiply 11 numbers a row instead of 10"
    ]
    assert reasons(fuse(Normed())) == [
        "%tanh, which it reads, is not made by a matmul with a plain weight"
    ]
    assert reasons(fuse(Twice())) == ["%dense.weight is read elsewhere too"]
    after = fuse(Wide())
    assert not reasons(after)
    assert not after.history.records[-1].applied


def test_an_encoded_weight_is_left_alone() -> None:
    program = capture_module(Adapted(), (torch.randn(2, 4, 6),))
    form = AffineInt(bits=8)
    program.weights["dense.weight"] = form.encode(program.weights["dense.weight"])
    after = Pipeline([Canonicalize(), FuseBottleneck()]).run(program)
    assert f"dense.weight is kept as {form.name}: fuse before quantizing" in reasons(after)
