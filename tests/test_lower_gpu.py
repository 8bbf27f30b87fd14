"""Packed weights on a GPU: our kernels as operators, dense products left to the compiler."""

from __future__ import annotations

from typing import Any

import build
import pytest
import torch
from planish.codegen.lower_gpu import lower_for_gpu
from planish.ir.formats import AffineInt
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from planish.kernels.linear_int import SPEC as LINEAR
from planish.kernels.rows_int import SPEC as ROWS
from torch._subclasses.fake_tensor import FakeTensorMode

VOCABULARY, WIDE, NARROW = 29, 48, 80


def on_a_gpu(node: Node) -> Node:
    """Only the device of a value is looked at; the numbers stay on the CPU."""
    with FakeTensorMode():
        node.meta["val"] = torch.empty(node.meta["val"].shape, device="cuda")
    return node


def program(group: int = 16) -> Program:
    """A packed table, a product with it turned to a head, and a dense product."""

    def body(ids: Node, table: Node, weight: Node) -> Any:
        hidden = op.embedding(table, ids)
        return op.linear(hidden, table), on_a_gpu(op.linear(hidden, weight))

    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, WIDE, generator=generator)
    weights = {
        "table": AffineInt(8, group).encode(table),
        "dense": torch.randn(NARROW, WIDE, generator=generator),
    }
    ids = torch.randint(0, VOCABULARY, (2, 5), generator=generator)
    return build.program(body, {"ids": ids}, weights, free=False)


def calls(program: Program) -> list[str]:
    return [
        str(node.target).removesuffix(".default")
        for node in program.graph.nodes
        if node.op == "call_function"
    ]


def test_packed_weights_run_packed() -> None:
    made = program()
    lowered, sentences = lower_for_gpu(made, "sm_90")
    assert calls(lowered) == [
        ROWS.operator.replace("::", "."),
        LINEAR.operator.replace("::", "."),
        "aten.linear",
    ]
    assert [s for s in sentences if "dense" in s], "the dense product is told"
    assert "table" not in lowered.weights, "only the packed parts are kept"
    inputs = list(made.examples)
    for one, other in zip(run(made, inputs), run(lowered, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_groups_that_the_layout_has_not_stay_dense() -> None:
    """Runs of a field are 16 columns, so groups of 12 cross them."""
    lowered, sentences = lower_for_gpu(program(group=12), "sm_90")
    assert calls(lowered) == ["aten.embedding", "aten.linear", "aten.linear"]
    assert any("groups of 12 are no multiple of 16" in sentence for sentence in sentences)


@pytest.mark.parametrize("arch", ["sm_80", "gfx942"])
def test_every_architecture_has_them(arch: str) -> None:
    assert LINEAR.operator.replace("::", ".") in calls(lower_for_gpu(program(), arch)[0])
