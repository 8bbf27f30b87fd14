"""GELUs, SiLU and gates in every spelling, and near misses with their sentences."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from planish.ir.capture import capture_module
from planish.ir.history import PassRecord
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.canonicalize import Canonicalize
from planish.passes.pipeline import Pipeline
from planish.passes.raise_gate import RaiseGate
from planish.passes.raise_gelu import RaiseGelu
from torch import Tensor, nn

F = nn.functional
ROOT = math.sqrt(2 / math.pi)


class Body(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)


def raised(
    function: Callable[..., Tensor], inputs: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Program, list[PassRecord]]:
    generator = torch.Generator().manual_seed(1)
    values = tuple(
        (torch.randn(3, 5, 12, generator=generator) * 2).to(dtype) for _ in range(inputs)
    )
    shapes = {"values": ({},) * inputs}
    program = capture_module(Body(function), values, dynamic_shapes=shapes)
    steps = (Canonicalize(), RaiseGelu(), RaiseGate())
    program = Pipeline(steps, verify="numbers", on_break="raise").run(program)
    return program, program.history.records[1:]


def text(program: Program) -> list[str]:
    """The operations, without types."""
    lines = program_text(program).splitlines()
    return [line.split(" : ")[0].split(" = ")[1] for line in lines if " = " in line]


def cubic(x: Tensor, coefficient: float = 0.044715) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(ROOT * (x + coefficient * torch.pow(x, 3.0))))


GELUS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), "gelu(%values_0)"),
    "erf, times": (lambda x: 0.5 * (x * (torch.erf(x * 0.70710678) + 1)), "gelu(%values_0)"),
    "erf, halved last": (lambda x: (x * (1 + torch.erf(x / 2**0.5))) / 2, "gelu(%values_0)"),
    "tanh": (cubic, "gelu(%values_0, approximate='tanh')"),
    "tanh, factored": (
        lambda x: x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x * x))),
        "gelu(%values_0, approximate='tanh')",
    ),
    "sigmoid": (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu(%values_0)"),
    "the operation": (F.gelu, "gelu(%values_0)"),
    "silu": (lambda x: torch.sigmoid(x) * x, "silu(%values_0)"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", GELUS)
def test_gelu_forms(form: str, dtype: torch.dtype) -> None:
    function, expected = GELUS[form]
    program, records = raised(function, dtype=dtype)
    assert text(program) == [expected]
    assert sum(len(record.applied) for record in records) == 1


GATES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "silu": (lambda g, u: F.silu(g) * u, "silu"),
    "silu, turned round": (lambda g, u: u * F.silu(g), "silu"),
    "spelled-out silu": (lambda g, u: g * torch.sigmoid(g) * u, "silu"),
    "gelu": (lambda g, u: F.gelu(g) * u, "gelu"),
    "gelu_tanh": (lambda g, u: F.gelu(g, approximate="tanh") * u, "gelu_tanh"),
    "spelled-out gelu": (lambda g, u: cubic(g) * u, "gelu_tanh"),
    "quick_gelu": (lambda g, u: (g * torch.sigmoid(g * 1.702)) * u, "quick_gelu"),
    "relu": (lambda g, u: torch.relu(g) * u, "relu"),
    "sigmoid": (lambda g, u: u * torch.sigmoid(g), "sigmoid"),
}


@pytest.mark.parametrize("form", GATES)
def test_gate_forms(form: str) -> None:
    function, activation = GATES[form]
    program, _ = raised(function, 2)
    assert text(program) == [f"gated(%values_0, %values_1, '{activation}')"]


def test_golden_packed_gate() -> None:
    """One matrix for gate and up, cut by chunk."""

    def packed(x: Tensor) -> Tensor:
        up, gate = x.chunk(2, -1)
        return up * F.silu(gate)

    program, _ = raised(packed)
    expected = """\
%values_0 : f32[3, 5, 12]
%slice = slice(%values_0, 2, 0, 6) : f32[3, 5, 6]
%slice_1 = slice(%values_0, 2, 6, 12) : f32[3, 5, 6]
%gated = gated(%slice_1, %slice, 'silu') : f32[3, 5, 6]
return [%gated]"""
    assert program_text(program) == expected


def test_silu_gates_before_sigmoid() -> None:
    program, _ = raised(lambda a, b: torch.sigmoid(a) * F.silu(b), 2)
    assert text(program) == ["sigmoid(%values_0)", "gated(%values_1, %sigmoid, 'silu')"]


NEAR_MISSES: dict[str, tuple[Callable[..., Tensor], int, str]] = {
    "cubic coefficient": (
        lambda x: cubic(x, 0.05),
        1,
        "the cubic coefficient is 0.05, not 0.044715",
    ),
    "slope of erf": (
        lambda x: 0.5 * x * (1 + torch.erf(x * 0.7)),
        1,
        "the slope is 0.7, not 0.707107",
    ),
    "no half": (
        lambda x: x * (1 + torch.erf(x / math.sqrt(2))),
        1,
        "1 + erf is not multiplied by x / 2",
    ),
    "slope of the sigmoid": (
        lambda x: x * torch.sigmoid(1.5 * x),
        1,
        "the slope of the sigmoid is 1.5, not 1.702",
    ),
    "gate is broadcast": (
        lambda g, u: torch.sigmoid(g[..., :1]) * u,
        2,
        "gate is [3, 5, 1] but up is [3, 5, 12]",
    ),
    "second reader": (
        lambda g, u: (a := F.silu(g)) * u + a,
        2,
        "a second reader uses the silu",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    function, inputs, sentence = NEAR_MISSES[name]
    _, records = raised(function, inputs)
    assert [entry.reason for record in records for entry in record.declined] == [sentence]
    assert [entry for record in records for entry in record.applied] == []


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.relu(x) * torch.relu(x),
        lambda x: 3.0 * torch.tanh(x / 3.0),
        lambda x: torch.sigmoid(x) * 2.0,
        lambda x: torch.erf(x) + 2,
    ],
    ids=["squared relu", "soft cap", "scaled sigmoid", "shifted erf"],
)
def test_others_are_no_candidates(function: Callable[[Tensor], Tensor]) -> None:
    _, records = raised(function)
    assert [record.declined + record.applied for record in records] == [[], []]  # type: ignore[operator]
