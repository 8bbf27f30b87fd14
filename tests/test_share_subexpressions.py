"""Equal calls become one, and nothing else."""

from __future__ import annotations

import build
import random_programs
import torch
from hypothesis import given, settings
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from planish.ir.text import program_diff
from planish.ir.verify import check_structure
from planish.passes.judge import run_pass
from planish.passes.share_subexpressions import ShareSubexpressions

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def shared(program: Program) -> tuple[Program, int]:
    after, journal = run_pass(ShareSubexpressions(), program)
    return after, journal.count


def test_equal_calls_become_one() -> None:
    def body(x: Node) -> Node:
        with build.inside("a"):
            a = op.mul(op.silu(x), 2)
        with build.inside("b"):
            b = op.mul(op.silu(x), 2)
        return op.add(a, b)

    before = build.program(body, {"x": X})
    after, count = shared(before)
    assert count == 2
    assert program_diff(before, after, context=0) == (
        "--- before\n"
        "+++ after\n"
        "@@ -4,3 +4 @@\n"
        "-%b.silu = silu(%x) : f32[n0, 6]\n"
        "-%b.mul = mul(%b.silu, 2) : f32[n0, 6]\n"
        "-%add = add(%a.mul, %b.mul) : f32[n0, 6]\n"
        "+%add = add(%a.mul, %a.mul) : f32[n0, 6]"
    )


def test_near_misses_stay_apart() -> None:
    """1, 1.0 and True; another operand order, dtype or dimension; random numbers."""

    def body(x: Node) -> list[Node]:
        pairs = [
            (op.mul(x, 1), op.mul(x, 1.0)),
            (op.mul(x, 1.0), op.mul(x, True)),
            (op.sub(x, op.neg(x)), op.sub(op.neg(x), x)),
            (op._to_copy(x, dtype=torch.float16), op._to_copy(x, dtype=torch.bfloat16)),
            (op.sum(x, [0]), op.sum(x, [1])),
            (op.rand_like(x), op.rand_like(x)),
        ]
        return [value for pair in pairs for value in pair]

    before = build.program(body, {"x": X})
    after, count = shared(before)
    # shared: the second mul by 1.0 and the second negation
    assert count == 2
    names = [getattr(value, "name", "") for value in after.results]
    assert len(set(names)) == 11
    assert sum("rand" in name for name in names) == 2


@settings(max_examples=60, deadline=None)
@given(random_programs.steps())
def test_outputs_keep_their_bits(made: tuple[list[random_programs.Step], list[int]]) -> None:
    before = random_programs.program(made)
    after, count = shared(before)
    check_structure(after, before)
    assert len(after.graph.nodes) == len(before.graph.nodes) - count
    for seed in (0, 1):
        inputs = random_programs.inputs(seed)
        for a, b in zip(run(before, inputs), run(after, inputs), strict=True):
            assert torch.equal(a, b)
    assert shared(after)[1] == 0  # nothing is left to share
