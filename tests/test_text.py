"""Programs as text: golden."""

from __future__ import annotations

from typing import Any

import build
import torch
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.ir.text import excerpt, node_text, program_diff, program_text, value_names

X = torch.randn(4, 6)
WEIGHTS = {"layers.0.up.weight": torch.randn(10, 6), "layers.0.down.weight": torch.randn(6, 10)}


def mlp(activation: Any = op.silu, twice: bool = False) -> Program:
    def body(x: Any, up: Any, down: Any) -> Any:
        with build.inside("layers.0.up"):
            y = op.linear(x, up)
        with build.inside("layers.0"):
            y = activation(y)
            y = activation(y) if twice else y
        with build.inside("layers.0.down"):
            y = op.linear(y, down)
            y = op.view(y, [-1, 2, 3])
        return op.add(y, 1e-06), op.topk(y, 2), op.to.dtype(y, torch.bfloat16)

    return build.program(body, {"x": X}, WEIGHTS)


GOLDEN = """\
%x : f32[n0, 6]
%layers.0.up = linear(%x, %layers.0.up.weight) : f32[n0, 10]
%layers.0 = silu(%layers.0.up) : f32[n0, 10]
%layers.0.down.linear = linear(%layers.0, %layers.0.down.weight) : f32[n0, 6]
%layers.0.down.view = view(%layers.0.down.linear, [-1, 2, 3]) : f32[n0, 2, 3]
%add = add(%layers.0.down.view, 1e-06) : f32[n0, 2, 3]
%topk = topk(%layers.0.down.view, 2) : (f32[n0, 2, 2], i64[n0, 2, 2])
%to = to.dtype(%layers.0.down.view, bf16) : bf16[n0, 2, 3]
return [%add, %topk, %to]"""


def test_a_program_as_text() -> None:
    assert str(mlp()) == GOLDEN


def test_weights_are_shown_when_asked_for() -> None:
    lines = program_text(mlp(), weights=True).splitlines()
    assert lines[1:3] == [
        "%layers.0.up.weight = weight : f32[10, 6]",
        "%layers.0.down.weight = weight : f32[6, 10]",
    ]
    assert [line for line in lines if line not in lines[1:3]] == GOLDEN.splitlines()


def test_a_diff_shows_what_changed_and_nothing_else() -> None:
    assert program_diff(mlp(), mlp(op.relu)) == (
        "--- before\n"
        "+++ after\n"
        "@@ -2,3 +2,3 @@\n"
        " %layers.0.up = linear(%x, %layers.0.up.weight) : f32[n0, 10]\n"
        "-%layers.0 = silu(%layers.0.up) : f32[n0, 10]\n"
        "+%layers.0 = relu(%layers.0.up) : f32[n0, 10]\n"
        " %layers.0.down.linear = linear(%layers.0, %layers.0.down.weight) : f32[n0, 6]"
    )
    assert program_diff(mlp(), mlp()) == ""


def test_names_are_unique_and_survive_edits_elsewhere() -> None:
    names = value_names(mlp(twice=True).graph)
    assert len(set(names.values())) == len(names)
    assert {"layers.0.silu", "layers.0.silu_1"} <= set(names.values())
    other = set(value_names(mlp().graph).values())
    assert other - {"layers.0"} <= set(names.values())


def test_an_excerpt_marks_the_fault() -> None:
    program = mlp()
    node = next(n for n in program.graph.nodes if "view" in str(n.target))
    assert excerpt(node) == (
        "    %layers.0.down.linear = linear(%layers.0, %layers.0.down.weight) : f32[n0, 6]\n"
        " >  %layers.0.down.view = view(%layers.0.down.linear, [-1, 2, 3]) : f32[n0, 2, 3]"
    )


def test_symbolic_sizes_are_named_in_order_of_appearance() -> None:
    def body(x: Any) -> Any:
        size = op.sym_size.int(x, 0)
        return size, op.expand(op.unsqueeze(x, 0), [3, size, 6])

    program = build.program(body, {"x": X})
    names = value_names(program.graph)
    texts = [node_text(node, names) for node in program.graph.nodes]
    assert texts[1] == "%sym_size = sym_size(%x, 0) : int n0"
    assert texts[3] == "%expand = expand(%unsqueeze, [3, %sym_size, 6]) : f32[3, n0, 6]"
