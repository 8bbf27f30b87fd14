"""RMSNorm and LayerNorm in every spelling and dtype, and near misses with their sentences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from planish.ir.capture import capture_module
from planish.ir.history import PassRecord
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.canonicalize import Canonicalize
from planish.passes.pipeline import Pipeline
from planish.passes.raise_norm import RaiseNorm
from torch import Tensor, nn

F = nn.functional
WIDTH = 12


class Spelled(nn.Module):
    def __init__(self, function: Callable[..., Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(WIDTH, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.randn(WIDTH, generator=generator).to(dtype))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def raised(
    function: Callable[..., Tensor], dtype: torch.dtype = torch.float32, rank: int = 3
) -> tuple[Program, PassRecord]:
    """The function after canonicalizing and raising, every step held to its bound."""
    sizes = (2, 7, 5, WIDTH)[-rank:]
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(1)).to(dtype) * 3 + 0.5
    program = capture_module(Spelled(function, dtype), (x,))
    steps = (Canonicalize(), RaiseNorm())
    program = Pipeline(steps, verify="numbers", on_break="raise").run(program)
    return program, program.history.records[-1]


def operators(program: Program) -> list[str]:
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    return [str(n.target).split(".")[1] for n in calls]


def rms(x: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def wide_then_back(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return w * rms(x.float()).to(x.dtype)


RMS_FORMS: dict[str, Callable[..., Tensor]] = {
    "weight after the cast back": wide_then_back,
    "weight before the cast back": lambda x, w, b: (w * rms(x.float())).to(x.dtype),
    "one plus weight": lambda x, w, b: (rms(x.float()) * (1.0 + w.float())).to(x.dtype),
    "no weight": lambda x, w, b: rms(x.float()).to(x.dtype),
    "product of itself": lambda x, w, b: x * torch.rsqrt((x * x).mean(-1, True) + 1e-5) * w,
    "square": lambda x, w, b: w * (torch.rsqrt(x.square().mean(-1, True) + 1e-5) * x),
    "one over the root": lambda x, w, b: x * (1 / torch.sqrt(x.pow(2).mean(-1, True) + 1e-5)) * w,
    "divided by the root": lambda x, w, b: w * (x / torch.sqrt(1e-5 + x.pow(2).mean(-1, True))),
    "power of minus a half": lambda x, w, b: x * (x.pow(2).mean(-1, True) + 1e-5).pow(-0.5) * w,
    "weight first": lambda x, w, b: (x * w) * torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5),
    "weight with the statistic": lambda x, w, b: (
        (torch.rsqrt(x.pow(2).mean(-1, True) + 1e-5) * w) * x
    ),
    "sum over width": lambda x, w, b: x * torch.rsqrt(x.pow(2).sum(-1, True) / WIDTH + 1e-5) * w,
    "mean without its axis": lambda x, w, b: (
        x * torch.rsqrt(x.pow(2).mean(-1) + 1e-5).unsqueeze(-1) * w
    ),
    "the operation": lambda x, w, b: F.rms_norm(x, [WIDTH], w, 1e-5),
    "the operation, eps of its dtype": lambda x, w, b: F.rms_norm(x, [WIDTH], w),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", RMS_FORMS)
def test_rms_norm_forms(form: str, dtype: torch.dtype) -> None:
    program, record = raised(RMS_FORMS[form], dtype)
    assert [entry.reason for entry in record.declined] == []
    assert operators(program) == ["rms_norm"]
    assert program.results[0].meta["val"].dtype == dtype


def test_golden_rms_norm() -> None:
    program, _ = raised(wide_then_back, torch.bfloat16)
    expected = """\
%x : bf16[n0, 5, 12]
%rms_norm = rms_norm(%x, %weight, 1e-05) : bf16[n0, 5, 12]
return [%rms_norm]"""
    assert program_text(program) == expected


def test_golden_offset() -> None:
    program, _ = raised(RMS_FORMS["one plus weight"], torch.bfloat16)
    assert "%rms_norm = rms_norm(%x, %weight, 1e-05, 1.0) : bf16[n0, 5, 12]" in program_text(
        program
    )


def test_a_norm_for_each_head() -> None:
    def per_head(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return w * rms(x.transpose(1, 2))

    program, _ = raised(per_head, rank=4)
    assert operators(program) == ["transpose", "rms_norm"]


def test_a_wide_result_keeps_its_precision() -> None:
    """float32 out of bfloat16 may not pass through bfloat16 on the way."""
    program, _ = raised(lambda x, w, b: w.float() * rms(x.float()), torch.bfloat16)
    assert program.results[0].meta["val"].dtype == torch.float32
    assert operators(program).count("rms_norm") == 1


def spelled_layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * w + b


def by_variance(x: Tensor, unbiased: bool) -> Tensor:
    variance = x.var(-1, keepdim=True, unbiased=unbiased)
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5)


def cast_layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    variance = (wide - mean).pow(2).mean(-1, keepdim=True)
    return (w.float() * ((wide - mean) * torch.rsqrt(variance + 1e-5))).to(x.dtype)


LAYER_FORMS: dict[str, Callable[..., Tensor]] = {
    "mean of squares": spelled_layer_norm,
    "variance": lambda x, w, b: b + w * by_variance(x, False),
    "no weight": lambda x, w, b: by_variance(x, False),
    "casts, no bias": cast_layer_norm,
    "native": lambda x, w, b: torch.native_layer_norm(x, [WIDTH], w, b, 1e-5)[0],
    "the operation": lambda x, w, b: F.layer_norm(x, [WIDTH], w, b),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", LAYER_FORMS)
def test_layer_norm_forms(form: str, dtype: torch.dtype) -> None:
    program, record = raised(LAYER_FORMS[form], dtype)
    assert [entry.reason for entry in record.declined] == []
    assert [entry.rule for entry in record.applied] == ["layer_norm"]
    assert operators(program) == ["layer_norm"]


def test_golden_layer_norm() -> None:
    program, _ = raised(spelled_layer_norm)
    expected = """\
%x : f32[n0, 5, 12]
%layer_norm = layer_norm(%x, [12], %weight, %bias, 1e-05) : f32[n0, 5, 12]
return [%layer_norm]"""
    assert program_text(program) == expected


NEAR_MISSES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "another axis": (
        lambda x, w, b: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5)),
        "the mean is over axis 1 of 3, not over the last axis alone",
    ),
    "two axes": (
        lambda x, w, b: w * (x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1e-5)),
        "the mean is over axis 1, 2 of 3, not over the last axis alone",
    ),
    "eps multiplied": (
        lambda x, w, b: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) * 1e-5)),
        "the mean of squares is multiplied by 1e-05, eps is added",
    ),
    "eps after the root": (
        lambda x, w, b: w * (x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-5)),
        "eps is added after the square root, not before it",
    ),
    "unbiased": (
        lambda x, w, b: w * by_variance(x, True) + b,
        "the variance is unbiased (divided by n - 1), a norm divides by n",
    ),
    "another value": (
        lambda x, w, b: (x + b) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5),
        "the inverse root mean square does not multiply the value that it was taken of",
    ),
    "a statistic for each column": (
        lambda x, w, b: torch.rsqrt((y := x[:, :, :5]).pow(2).mean(-1) + 1e-5).unsqueeze(1) * y,
        "the inverse root mean square does not multiply the value that it was taken of",
    ),
    "two readers": (
        lambda x, w, b: x * (s := torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)) + b * s,
        "the inverse root mean square has 2 readers, not one",
    ),
    "two axes in one operation": (
        lambda x, w, b: F.rms_norm(x, [5, WIDTH], None, 1e-5),
        "it normalizes over the last 2 axes, not over the last alone",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    function, sentence = NEAR_MISSES[name]
    _, record = raised(function)
    assert [entry.reason for entry in record.declined] == [sentence]
    assert record.applied == []


def test_what_others_read_stays() -> None:
    """The normalized value is read twice: the norm is raised without the weight."""

    def twice(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        normed = rms(x)
        return normed * w + normed * b

    program, _ = raised(twice)
    assert operators(program) == ["rms_norm", "mul", "mul", "add"]


def test_a_root_of_something_else_is_no_candidate() -> None:
    _, record = raised(lambda x, w, b: torch.rsqrt(x.abs() + 1) * x)
    assert record.declined == record.applied == []
