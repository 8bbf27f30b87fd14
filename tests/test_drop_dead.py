"""What nobody reads goes, and nothing else."""

from __future__ import annotations

import build
import captured
import random_programs
import torch
from hypothesis import given, settings
from planish.ir.facts import refute
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from planish.ir.text import program_diff
from planish.ir.verify import check_structure
from planish.passes.drop_dead import DropDead
from planish.passes.judge import run_pass

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
WEIGHTS = {"used": torch.randn(9, 6), "unused": torch.randn(5, 6), "dead": torch.randn(7, 6)}


def dropped(program: Program) -> tuple[Program, int]:
    after, journal = run_pass(DropDead(), program)
    return after, journal.count


def test_dead_values_and_their_weights_go() -> None:
    def body(x: Node, used: Node, unused: Node, dead: Node) -> Node:
        with build.inside("gone"):
            op.relu(op.linear(x, dead))
        with build.inside("kept"):
            return op.linear(x, used)

    before = build.program(body, {"x": X}, WEIGHTS)
    after, count = dropped(before)
    assert count == 2
    assert program_diff(before, after, context=0) == (
        "--- before\n"
        "+++ after\n"
        "@@ -2,2 +1,0 @@\n"
        "-%gone.linear = linear(%x, %dead) : f32[n0, 7]\n"
        "-%gone.relu = relu(%gone.linear) : f32[n0, 7]"
    )
    assert list(after.weights) == ["used"]
    assert list(before.weights) == list(WEIGHTS)


def test_random_numbers_and_inputs_stay() -> None:
    """A random draw moves the generator on, which later draws see; inputs are the signature."""

    def body(x: Node, y: Node) -> Node:
        op.rand_like(x)
        return op.rand_like(y)

    before = build.program(body, {"x": X, "y": X})
    after, count = dropped(before)
    assert count == 0
    assert str(after) == str(before)


def test_assertions_of_a_model_go() -> None:
    program = captured.captured("llama")
    assert "assert_tensor_metadata" in str(program)
    after, _ = dropped(program)
    assert "assert" not in str(after)
    assert refute(after, frozenset({"no_dead_values", "functional"})) is None
    inputs = list(program.examples)
    assert torch.equal(run(after, inputs)[0], run(program, inputs)[0])


@settings(max_examples=60, deadline=None)
@given(random_programs.steps())
def test_outputs_keep_their_bits(made: tuple[list[random_programs.Step], list[int]]) -> None:
    before = random_programs.program(made)
    after, _ = dropped(before)
    check_structure(after, before)
    for seed in (0, 1):
        inputs = random_programs.inputs(seed)
        for a, b in zip(run(before, inputs), run(after, inputs), strict=True):
            assert torch.equal(a, b)
    reads = {read for node in after.graph.nodes for read in node.all_input_nodes}
    kept = [node for node in after.graph.nodes if node.op in ("call_function", "get_attr")]
    assert all(node in reads for node in kept)
    assert set(after.weights) == {str(node.target) for node in after.weight_nodes()}
    assert dropped(after)[1] == 0
