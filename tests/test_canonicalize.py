"""Canonical spellings: golden texts, what must stay, and random chains of views."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import build
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.edit import current_editor, infer, value_of
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from planish.ir.text import program_text
from planish.passes.canonicalize import Canonicalize
from planish.passes.pipeline import run_pass
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FAR = 9223372036854775807
aten = torch.ops.aten


def canonical(program: Program) -> Program:
    return run_pass(Canonicalize(), program)[0]


def lines(body: Callable[..., Any], **inputs: Tensor) -> list[str]:
    """The operations after canonicalizing, without types, and that the values are the same."""
    program = build.program(body, inputs)
    after = canonical(program)
    for old, new in zip(
        run(program, list(inputs.values())), run(after, list(inputs.values())), strict=True
    ):
        assert old.dtype == new.dtype
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    calls = [line for line in program_text(after).splitlines() if " = " in line]
    return [line.split(" = ", 1)[1].rsplit(" : ", 1)[0] for line in calls]


X = torch.arange(4 * 6 * 10, dtype=torch.float32).reshape(4, 6, 10) - 7.5
COUNTS = torch.arange(4 * 6).reshape(4, 6)
TRUTH = COUNTS > 5

CASES: dict[str, tuple[Callable[..., Any], dict[str, Tensor], list[str]]] = {
    "views are reshapes": (
        lambda x: op._unsafe_view(op.clone(op.slice(x, 0, 0, FAR)), [-1, 60]),
        {"x": X},
        ["reshape(%x, [-1, 60])"],
    ),
    "a reshape of reshapes": (
        lambda x: op.view(op.unsqueeze(op.view(x, [-1, 2, 30]), 1), [-1, 3, 20]),
        {"x": X},
        ["reshape(%x, [-1, 3, 20])"],
    ),
    "a reshape back": (
        lambda x: op.relu(op.view(op.view(x, [-1, 60]), [-1, 6, 10])),
        {"x": X},
        ["relu(%x)"],
    ),
    "a slice of a slice": (
        lambda x: op.slice(op.slice(x, 2, 1, 9), -1, 2, FAR, 2),
        {"x": X},
        ["slice(%x, 2, 3, 9, 2)"],
    ),
    "negative bounds": (lambda x: op.slice(x, 2, -4, -1), {"x": X}, ["slice(%x, 2, 6, 9)"]),
    "two transposes": (
        lambda x: op.relu(op.transpose(op.transpose(x, 1, 2), -1, -2)),
        {"x": X},
        ["relu(%x)"],
    ),
    "a permutation of two axes": (
        lambda x: op.permute(op.permute(x, [2, 0, 1]), [1, 0, 2]),
        {"x": X},
        ["transpose(%x, 1, 2)"],
    ),
    "parts of a split": (
        lambda x: [op.relu(part(op.split_with_sizes(x, [3, 7], -1), i)) for i in (0, 1)],
        {"x": X},
        ["slice(%x, 2, 0, 3)", "relu(%slice)", "slice(%x, 2, 3, 10)", "relu(%slice_1)"],
    ),
    "parts of an unbind": (
        lambda x: op.relu(part(op.unbind(x, 1), 5)),
        {"x": X},
        ["select(%x, 1, 5)", "relu(%select)"],
    ),
    "a buffer written by slices": (
        lambda x: op.slice_scatter(
            op.slice_scatter(op.zeros_like(x), op.relu(op.slice(x, 2, 0, 4)), 2, 0, 4),
            op.neg(op.slice(x, 2, 4, 10)),
            2,
            4,
            FAR,
        ),
        {"x": X},
        [
            "slice(%x, 2, 0, 4)",
            "relu(%slice)",
            "slice(%x, 2, 4, 10)",
            "neg(%slice_1)",
            "cat([%relu, %neg], 2)",
        ],
    ),
    "casts that do nothing": (
        lambda x: op.relu(op._to_copy(op._to_copy(x, dtype=torch.float64), dtype=torch.float32)),
        {"x": X},
        ["relu(%x)"],
    ),
    "a cast that rounds stays": (
        lambda x: op._to_copy(op._to_copy(x, dtype=torch.bfloat16), dtype=torch.float32),
        {"x": X},
        ["_to_copy(%x, dtype=bf16)", "_to_copy(%to_copy, dtype=f32)"],
    ),
    "times and over one": (lambda x: op.relu(op.div(op.mul(x, 1.0), 1)), {"x": X}, ["relu(%x)"]),
    "times one that changes the type stays": (
        lambda x: op.mul(x, 1.0),
        {"x": COUNTS},
        ["mul(%x, 1.0)"],
    ),
    "an integer plus nothing": (lambda x: op.neg(op.add(x, 0)), {"x": COUNTS}, ["neg(%x)"]),
    "a float plus zero stays": (lambda x: op.add(x, 0.0), {"x": X}, ["add(%x, 0.0)"]),
    "a division by a constant stays": (lambda x: op.div(x, 8.0), {"x": X}, ["div(%x, 8.0)"]),
    "scalar overloads": (
        lambda x: op.sub.Scalar(op.mul.Scalar(x, 3.0), 2.0),
        {"x": X},
        ["mul(%x, 3.0)", "sub(%mul, 2.0)"],
    ),
    "no dropout": (lambda x: op.relu(op.dropout(x, 0.1, False)), {"x": X}, ["relu(%x)"]),
    "an expand to the same sizes": (
        lambda x: op.neg(
            op.expand(op.expand(op.unsqueeze(x, 1), [-1, 3, -1, -1]), [-1, -1, 6, 10])
        ),
        {"x": X},
        ["unsqueeze(%x, 1)", "expand(%unsqueeze, [-1, 3, 6, 10])", "neg(%expand)"],
    ),
    "booleans are logical": (
        lambda x, y: op.bitwise_not(
            op.bitwise_and(op.bitwise_and(x, op.new_ones(x, [], dtype=torch.bool)), y)
        ),
        {"x": TRUTH, "y": ~TRUTH},
        ["logical_and(%x, %y)", "logical_not(%logical_and)"],
    ),
    "a cat of one": (
        lambda x: op.relu(op.cat([x, op.slice(x, 2, 10, 10)], -1)),
        {"x": X},
        ["relu(%x)"],
    ),
    "two names": (
        lambda x: op.special_expit(op.negative(x)),
        {"x": X},
        ["neg(%x)", "sigmoid(%neg)"],
    ),
    "a square is a power": (lambda x: op.square(x), {"x": X}, ["pow.Tensor_Scalar(%x, 2)"]),
}


def part(whole: Node, place: int) -> Node:
    return current_editor().emit(operator.getitem, whole, place)


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    body, inputs, expected = CASES[name]
    assert lines(body, **inputs) == expected


def test_known_sizes_are_numbers_and_equal_ones_are_shared() -> None:
    def body(x: Node, y: Node) -> list[Node]:
        rows = [op.sym_size(value, 0) for value in (x, y)]
        width = op.sym_size(x, 2)
        return [
            op.view(v, [r, 6 * 1, width]) for v, r in zip((op.neg(x), op.neg(y)), rows, strict=True)
        ]

    text = program_text(canonical(build.program(body, {"x": X, "y": X + 1})))
    assert "sym_size" not in text


def test_copies_of_inputs_that_are_returned_stay() -> None:
    """The caller must not be given the memory of a weight or of another argument."""
    program = build.program(lambda x: op.clone(x), {"x": X})
    assert "clone(%x)" in program_text(canonical(program))


def test_layout_dependent_programs_keep_their_copies() -> None:
    def body(x: Node) -> Node:
        return op.as_strided(op.clone(op.transpose(x, 1, 2)), [4, 6], [1, 2])

    after, journal = run_pass(Canonicalize(), build.program(body, {"x": X}, free=False))
    assert "clone" in program_text(after)
    reasons = [entry.reason for entry in journal.declined_records()]
    assert reasons == ["it reads memory by strides, so copies and views stay"]


def test_strides_stay_true() -> None:
    """A copy made for its layout goes: what is known of the strides below it changes."""

    def body(x: Node) -> Node:
        copied = op.clone(op.transpose(x, 1, 2), memory_format=torch.contiguous_format)
        return op.neg(op.slice(copied, 1, 0, 5))

    after = canonical(build.program(body, {"x": X}, free=False))
    for node in after.graph.nodes:
        if node.op == "call_function":
            claimed = value_of(node)
            assert isinstance(claimed, FakeTensor)
            assert infer(node, claimed.fake_mode).stride() == claimed.stride()


@pytest.mark.parametrize("limit", range(8))
def test_every_prefix_of_the_rewrites_runs(limit: int) -> None:
    """A bisection applies the first few only: a view may not fail for a copy that is gone."""

    def body(x: Node) -> Node:
        turned = op.clone(op.transpose(x, 1, 2), memory_format=torch.contiguous_format)
        return op.relu(op.view(op.view(turned, [-1, 60]), [-1, 4, 15]))

    program = build.program(body, {"x": X})
    after, _ = run_pass(Canonicalize(), program, limit=limit)
    assert torch.equal(run(after, [X])[0], run(program, [X])[0])


STEPS: tuple[Callable[[Node, int], Node], ...] = (
    lambda x, n: op.transpose(x, n % rank(x), (n // 3) % rank(x)),
    lambda x, n: op.permute(x, [(i + n) % rank(x) for i in range(rank(x))]),
    lambda x, n: op.unsqueeze(x, n % (rank(x) + 1)),
    lambda x, n: op.squeeze.dim(x, n % rank(x)),
    lambda x, n: op.slice(x, n % rank(x), n % 2, FAR),
    lambda x, n: op.slice(x, n % rank(x), -3, -1 if n % 2 else FAR),
    lambda x, n: op.slice(x, n % rank(x), 0, FAR, 1 + n % 2),
    lambda x, n: op.reshape(x, [-1]) if n % 2 else op.reshape(x, [1, -1, 1]),
    lambda x, n: (
        op._unsafe_view(op.clone(x, memory_format=torch.contiguous_format), [2, -1])
        if value_of(x).numel() % 2 == 0
        else op.clone(x)
    ),
    lambda x, n: op.expand(op.unsqueeze(x, 0), [1 + n % 2, *([-1] * rank(x))]),
    lambda x, n: op._to_copy(x, dtype=(torch.float32, torch.float64, torch.bfloat16)[n % 3]),
    lambda x, n: op.mul(x, 1.0) if n % 2 else op.sub.Scalar(x, 0),
    lambda x, n: (
        part(op.split_with_sizes(x, [1, size(x, n) - 1], n % rank(x)), n // 2 % 2)
        if size(x, n) > 1
        else op.neg(x)
    ),
    lambda x, n: op.cat([x, op.neg(x)], n % rank(x)) if n % 3 else op.cat([x], n % rank(x)),
)


def rank(x: Node) -> int:
    return value_of(x).dim()


def size(x: Node, n: int) -> int:
    return value_of(x).shape[n % rank(x)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(STEPS) - 1), st.integers(0, 11)), max_size=9))
def test_random_chains_keep_every_bit_and_settle_at_once(steps: list[tuple[int, int]]) -> None:
    def body(x: Node) -> Node:
        value = op.neg(x)
        for kind, n in steps:
            if rank(value) and value_of(value).numel() < 512:
                value = STEPS[kind](value, n)
        return op.neg(value)

    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2))
    program = build.program(body, {"x": x}, free=False)
    once = canonical(program)
    assert torch.equal(run(once, [x])[0], run(program, [x])[0])
    twice, journal = run_pass(Canonicalize(), once)
    assert journal.count == 0
    assert program_text(twice) == program_text(once)
