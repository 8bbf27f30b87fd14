"""What is fused into one generated kernel, what is not, and the text of such a kernel."""

from __future__ import annotations

from typing import Any

import build
import pytest
import random_programs
import torch
from hypothesis import given, settings
from planish.codegen.find_regions import find_regions, saved_bytes, why_not
from planish.codegen.kernel_call import KernelCall
from planish.codegen.lower_triton import lower_for_triton
from planish.codegen.region import Region, cut_region
from planish.codegen.region_source import region_source
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from torch import Tensor

WIDE, NARROW = 24, 40


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def names(program: Program) -> list[list[str]]:
    return [[node.name for node in members] for members in find_regions(program.graph)]


def residual_then_norm() -> Program:
    def body(x: Node, y: Node, weight: Node) -> Any:
        total = op.add(x, y)
        return op.rms_norm(total, weight, 1e-6), total

    inputs = {"x": values(4, 3, WIDE), "y": values(4, 3, WIDE, seed=1)}
    return build.program(body, inputs, {"norm.weight": values(WIDE)})


KERNEL = """\
@triton.jit
def k(
    X0,
    X0_row,
    X1,
    X1_row,
    X2,
    Y0,
    Y1,
    rows,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    \"\"\"what it is\"\"\"
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < 24)
    x0 = tl.load(X0 + row * X0_row + col, mask=inside, other=0)
    x1 = tl.load(X1 + row * X1_row + col, mask=inside, other=0)
    x2 = tl.load(X2 + col, mask=col < 24, other=0)
    add_3 = x0 + (x1)
    rms_norm_4_mean = tl.sum(tl.where(inside, add_3 * add_3, 0.0), 1, keep_dims=True) / 24
    rms_norm_4 = add_3 * tl.rsqrt(rms_norm_4_mean + 1e-06) * x2
    tl.store(Y0 + row * 24 + col, add_3.to(Y0.dtype.element_ty), mask=inside)
    tl.store(Y1 + row * 24 + col, rms_norm_4.to(Y1.dtype.element_ty), mask=inside)
"""


def test_the_text_of_a_kernel() -> None:
    program = residual_then_norm()
    (members,) = find_regions(program.graph)
    text = region_source(cut_region(members)).named("k", "what it is")
    assert text.startswith(KERNEL)
    assert "def k_plan(x0, x1, x2, shapes, leads, rows, columns):" in text


def test_one_kernel_saves_what_lies_between() -> None:
    """The sum is still written, since it is a result, and read once less."""
    (members,) = find_regions(residual_then_norm().graph)
    saved = saved_bytes(members)
    assert int(saved.node.hint) == 4 * 3 * WIDE * 4


def test_a_value_that_goes_around_a_region_splits_it() -> None:
    """c reads b, and b is made outside from a: one kernel for a and c could not run."""

    def body(x: Node, weight: Node) -> Any:
        a = op.relu(x)
        b = op.cumsum(a, 0)
        return op.add(a, b)

    program = build.program(body, {"x": values(4, WIDE)}, {"w": values(WIDE)})
    assert len(names(program)) == 2


def test_regions_that_need_each_other_stay_apart() -> None:
    """p and q each hold an early and a late value; merged by either edge they would be a circle."""

    def body(x: Node, y: Node) -> Any:
        a, b = op.relu(x), op.neg(y)
        over_a, over_b = op.cumsum(a, 0), op.cumsum(b, 0)
        return op.mul(a, over_b), op.mul(b, over_a)

    program = build.program(body, {"x": values(4, WIDE), "y": values(4, WIDE, seed=1)})
    lowering = lower_for_triton(program)
    inputs = list(program.examples)
    for one, other in zip(run(program, inputs), run(lowering.program, inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (lambda x: op.cumsum(x, 0), "neither pointwise nor a row operation"),
        (lambda x: op.pow.Tensor_Scalar(x, 1.7), "power 1.7"),
        (lambda x: op.sum.dim_IntList(x, [0], True), "another axis than the last"),
        (lambda x: op.sum.dim_IntList(x, [-1], False), "drops the axis"),
        (lambda x: op._to_copy(x, dtype=torch.float64), "float64"),
        (lambda x: op.div.Tensor_mode(x, x, rounding_mode="floor"), "neither pointwise"),
    ],
)
def test_why_an_operation_is_left_out(body: Any, sentence: str) -> None:
    program = build.program(body, {"x": values(4, WIDE)})
    (node,) = [n for n in program.graph.nodes if n.op == "call_function"]
    assert sentence in str(why_not(node))


def test_a_row_that_is_too_long_is_left_out() -> None:
    program = build.program(lambda x: op.softmax.int(x, -1), {"x": values(2, 20000)})
    (node,) = [n for n in program.graph.nodes if n.op == "call_function"]
    assert "20000 values" in str(why_not(node))
    assert names(program) == []


def linear(*after: Any) -> Program:
    def body(x: Node, other: Node, weight: Node, bias: Node) -> Any:
        value = op.linear(x, weight, bias)
        for step in after:
            value = step(value, other)
        return value

    inputs = {"x": values(4, 3, WIDE), "other": values(4, 3, NARROW, seed=2)}
    return build.program(body, inputs, {"w": values(NARROW, WIDE), "b": values(NARROW)})


def lowered(program: Program) -> tuple[list[KernelCall], list[Region]]:
    lowering = lower_for_triton(program)
    inputs = list(program.examples)
    for one, other in zip(run(program, inputs), run(lowering.program, inputs), strict=True):
        torch.testing.assert_close(one, other)
    targets = [node.target for node in lowering.program.graph.nodes]
    calls = [target for target in targets if isinstance(target, KernelCall)]
    return calls, [target for target in targets if isinstance(target, Region)]


def test_what_follows_a_matmul_becomes_its_epilogue() -> None:
    calls, regions = lowered(linear(lambda v, o: op.relu(v), lambda v, o: op.add(v, o)))
    assert [call.spec.name for call in calls] == ["linear_dense"]
    assert calls[0].epilogue is not None
    assert [n.target._schema.name for n in calls[0].epilogue.operations] == [
        "aten::relu",
        "aten::add",
    ]
    assert regions == []


def test_a_matmul_that_is_read_twice_keeps_its_result() -> None:
    calls, regions = lowered(linear(lambda v, o: op.mul(op.relu(v), v)))
    assert calls[0].epilogue is None
    assert len(regions) == 1


def test_a_row_operation_is_no_epilogue() -> None:
    calls, regions = lowered(linear(lambda v, o: op.softmax.int(v, -1)))
    assert calls[0].epilogue is None
    assert len(regions) == 1


def test_an_epilogue_keeps_the_dtype() -> None:
    calls, _ = lowered(linear(lambda v, o: op._to_copy(v, dtype=torch.bfloat16)))
    assert calls[0].epilogue is None


def gated_product(use_twice: bool = False, row_wise: bool = False) -> Program:
    def body(gate: Node, up: Node, weight: Node) -> Any:
        made = op.softmax.int(gate, -1) if row_wise else op.mul(op.silu(gate), up)
        product = op.linear(made, weight)
        return (product, made) if use_twice else product

    inputs = {"gate": values(4, 3, WIDE), "up": values(4, 3, WIDE, seed=4)}
    return build.program(body, inputs, {"w": values(NARROW, WIDE)})


def test_what_only_a_matmul_reads_is_made_as_it_is_loaded() -> None:
    calls, regions = lowered(gated_product())
    assert calls[0].prologue is not None and len(calls[0].prologue.operations) == 2
    assert regions == []


def test_what_others_read_too_is_made_once() -> None:
    calls, regions = lowered(gated_product(use_twice=True))
    assert calls[0].prologue is None
    assert len(regions) == 1


def test_a_row_operation_is_no_prologue() -> None:
    calls, regions = lowered(gated_product(row_wise=True))
    assert calls[0].prologue is None
    assert len(regions) == 1


@settings(max_examples=60, deadline=None)
@given(made=random_programs.steps())
def test_lowered_programs_compute_the_same(made: Any) -> None:
    program = random_programs.program(made)
    inputs = random_programs.inputs()
    before = run(program, inputs)
    after = run(lower_for_triton(program).program, inputs)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other)
