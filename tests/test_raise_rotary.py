"""Rotary embeddings in every spelling, their halved tables, and near misses with sentences."""

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
from planish.passes.raise_rotary import RaiseRotary
from torch import Tensor, nn

BATCH, HEADS, LENGTH, HALF = 2, 3, 7, 4
Spelling = Callable[[Tensor, Tensor], Tensor]
"""(x f32[batch, heads, length, 2 * HALF], angles f32[length, HALF]) to the turned x."""


class Turned(nn.Module):
    def __init__(self, function: Spelling) -> None:
        super().__init__()
        self.register_buffer("frequency", 10.0 ** -torch.linspace(0, 2, HALF))
        twice = torch.linspace(0, 1, LENGTH * HALF).reshape(LENGTH, HALF).repeat(1, 2)
        self.register_buffer("cosine", twice.cos())
        self.register_buffer("sine", twice.sin())
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        if self.function is from_weights:
            return half(x, self.cosine, self.sine)
        position = torch.arange(x.shape[2]).float()
        return self.function(x, position[:, None] * self.frequency)


def raised(function: Spelling, channels: int = 2 * HALF) -> tuple[Program, PassRecord]:
    sizes = (BATCH, HEADS, LENGTH, channels)
    x = torch.randn(sizes, generator=torch.Generator().manual_seed(1))
    program = capture_module(Turned(function), (x,))
    steps = (Canonicalize(), RaiseRotary())
    program = Pipeline(steps, verify="numbers", on_break="raise").run(program)
    return program, program.history.records[-1]


def operators(program: Program) -> list[str]:
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    return [str(n.target).split(".")[1] for n in calls]


def rotate_half(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), -1)


def rotate_pairs(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def from_weights(x: Tensor, angles: Tensor) -> Tensor:
    raise AssertionError("the module reads its tables")


def twice(angles: Tensor) -> Tensor:
    return torch.cat((angles, angles), -1)


def every_second(angles: Tensor) -> Tensor:
    return angles.repeat_interleave(2, -1)


def interleaved(x: Tensor, angles: Tensor) -> Tensor:
    wide = every_second(angles)
    return x * wide.cos() + rotate_pairs(x) * wide.sin()


def stacked_angles(x: Tensor, angles: Tensor) -> Tensor:
    wide = torch.stack((angles, angles), -1).flatten(-2)
    return (rotate_pairs(x) * wide.sin()) + (wide.cos() * x)


def split(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def neighbours_to_halves(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), -1)


def unbound_pairs(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (HALF, 2)).unbind(-1)
    turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
    return torch.stack(turned, -1).flatten(-2)


def of_complex(x: Tensor, angles: Tensor) -> Tensor:
    turn = torch.polar(torch.ones_like(angles), angles)
    pairs = torch.view_as_complex(x.unflatten(-1, (HALF, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


def scaled_tables(x: Tensor, angles: Tensor) -> Tensor:
    wide = twice(angles)
    cos, sin = (
        (wide.cos() * 1.3).to(x.dtype)[None, None],
        (wide.sin() * 1.3).to(x.dtype)[None, None],
    )
    return half(x, cos, sin)


def heads_last(x: Tensor, angles: Tensor) -> Tensor:
    wide = twice(angles)[None, :, None]
    return half(x.transpose(1, 2), wide.cos(), wide.sin())


def half_of_half(x: Tensor, angles: Tensor) -> Tensor:
    """Partial: the first half of the channels is turned."""
    turned, rest = x[..., : 2 * HALF], x[..., 2 * HALF :]
    return torch.cat((half(turned, twice(angles).cos(), twice(angles).sin()), rest), -1)


def other_way(x: Tensor, angles: Tensor) -> Tensor:
    first, second = x[..., :HALF], x[..., HALF:]
    return x * twice(angles).cos() + torch.cat((second, -first), -1) * twice(angles).sin()


FORMS: dict[str, tuple[Spelling, int, str]] = {
    "half": (lambda x, f: half(x, twice(f).cos(), twice(f).sin()), 8, "rotary"),
    "interleaved": (interleaved, 8, "rotary"),
    "interleaved, stacked angles": (stacked_angles, 8, "rotary"),
    "split": (split, 8, "rotary"),
    "neighbours written as halves": (neighbours_to_halves, 8, "rotary"),
    "unbound pairs": (unbound_pairs, 8, "rotary"),
    "complex": (of_complex, 8, "rotary"),
    "scaled tables": (scaled_tables, 8, "rotary"),
    "heads after the length": (heads_last, 8, "rotary"),
    "partial": (half_of_half, 14, "rotary"),
    "tables from weights": (from_weights, 8, "rotary"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    function, channels, last = FORMS[form]
    program, record = raised(function, channels)
    assert [entry.reason for entry in record.declined] == []
    assert operators(program)[-1] == last
    assert not {"neg", "view_as_complex", "polar", "repeat_interleave"} & set(operators(program))
    turned = program.results[0]
    assert turned.args[1].meta["val"].shape[-1] == HALF


def test_golden_half() -> None:
    program, _ = raised(FORMS["half"][0])
    expected = """\
%x : f32[n0, 3, 7, 8]
%arange = arange(7, dtype=i64, device=device(type='cpu')) : i64[7]
%to_copy = _to_copy(%arange, dtype=f32) : f32[7]
%unsqueeze = unsqueeze(%to_copy, 1) : f32[7, 1]
%mul = mul(%unsqueeze, %frequency) : f32[7, 4]
%cos = cos(%mul) : f32[7, 4]
%sin = sin(%mul) : f32[7, 4]
%rotary = rotary(%x, %cos, %sin) : f32[n0, 3, 7, 8]
return [%rotary]"""
    assert program_text(program) == expected


def test_the_negative_angle_negates_the_sine() -> None:
    program, record = raised(other_way)
    assert (len(record.applied), record.declined) == (1, [])
    assert operators(program)[-3:] == ["sin", "neg", "rotary"]
    assert program.results[0].args[2].meta["val"].shape[-1] == HALF


def test_interleaved_says_so() -> None:
    program, _ = raised(interleaved)
    assert program.results[0].args[3] is True


def test_one_table_serves_all_turns() -> None:
    def two(x: Tensor, angles: Tensor) -> Tensor:
        wide = twice(angles)
        return half(x, wide.cos(), wide.sin()) + half(x * 2, wide.cos(), wide.sin())

    program, record = raised(two)
    assert len(record.applied) == 2
    assert operators(program).count("rotary") == 2


def wrong_sine(x: Tensor, angles: Tensor) -> Tensor:
    return half(x, twice(angles).cos(), twice(angles * 2).sin())


def different_halves(x: Tensor, angles: Tensor) -> Tensor:
    wide = torch.cat((angles, angles * 2), -1)
    return half(x, wide.cos(), wide.sin())


def another_value(x: Tensor, angles: Tensor) -> Tensor:
    return x * twice(angles).cos() + rotate_half(x * 2) * twice(angles).sin()


def mixed_layouts(x: Tensor, angles: Tensor) -> Tensor:
    wide = every_second(angles)
    return half(x, wide.cos(), wide.sin())


def crossed(x: Tensor, angles: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + b * angles.sin()), -1)


NOT_TWICE = "of the cosine, the angle table is not proven to hold each angle twice: it comes from "
NEAR_MISSES: dict[str, tuple[Spelling, str]] = {
    "another sine": (wrong_sine, "the sine is not of the same angle table as the cosine"),
    "different halves": (different_halves, NOT_TWICE + "cat"),
    "mixed layouts": (mixed_layouts, NOT_TWICE + "repeat_interleave"),
    "another value": (
        another_value,
        "the turned value is not made of the two halves of what the cosine multiplies",
    ),
    "crossed": (crossed, "its two parts do not turn one pair of values by one angle"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    function, sentence = NEAR_MISSES[name]
    _, record = raised(function)
    assert [entry.reason for entry in record.declined] == [sentence]
    assert record.applied == []


def test_a_sum_of_products_is_no_candidate() -> None:
    _, record = raised(lambda x, f: x * twice(f).cos() + torch.relu(x) * twice(f).sin())
    assert record.declined == record.applied == []
