"""migrate_gamma: post-norm gammas go to products and to the residual."""

from __future__ import annotations

from typing import Any

import build
import pytest
import torch
import zoo
from captured import captured
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.passes.migrate_gamma import MigrateGamma
from planish.passes.pipeline import Pipeline
from planish.recipes import pipeline

LAYER_NORM = torch.ops.aten.layer_norm.default


def migrated(program: Program) -> Program:
    """The pipeline holds the outputs to the contract."""
    probes = [list(program.examples)]
    return Pipeline([MigrateGamma()], verify="numbers", on_break="raise").run(
        program, probes=probes
    )


@pytest.mark.parametrize(("name", "norms"), [("bert", 4), ("distilbert", 4), ("bart", 11)])
def test_post_norm_models(name: str, norms: int) -> None:
    attention: zoo.Attention = "sdpa"
    program = pipeline("raise", verify="structure").run(captured(name, attention))
    after = migrated(program)
    notes = [a.note for a in after.history.records[-1].applied if a.note.startswith("moved")]
    assert len(notes) >= norms - 2
    ones = [
        node
        for node in after.graph.nodes
        if node.target is LAYER_NORM and bool((after.weights[node.args[2].target] == 1).all())
    ]
    assert len(ones) == len(notes)


def block(shared: bool = False, gamma: float = 0.5) -> Program:
    """norm [6], linear [10, 6], relu, linear [6, 10], plus the norm."""
    generator = torch.Generator().manual_seed(3)
    weights = {
        "g": torch.rand(6, generator=generator) + gamma,
        "b": torch.randn(6, generator=generator),
        "w1": torch.randn(10, 6, generator=generator),
        "w2": torch.randn(6, 10, generator=generator),
    }

    def body(x: Any, g: Any, b: Any, w1: Any, w2: Any) -> Any:
        n = op.layer_norm(x, [6], g, b, 1e-5)
        h = op.relu(op.linear(n, w1))
        h = op.add(h, op.linear(x, w1)) if shared else h
        return op.add(n, op.linear(h, w2))

    program = build.program(body, {"x": torch.randn(2, 5, 6)}, weights)
    program.facts |= {"raised"}
    return program


def test_golden() -> None:
    program = block()
    after = migrated(program)
    text = str(after)
    assert "%mul = mul(%layer_norm, %g.gamma) : f32[n0, 5, 6]" in text
    assert "%add = add(%mul, %linear_1) : f32[n0, 5, 6]" in text
    gamma = program.weights["g"].double()
    assert torch.equal(after.weights["w1"], (program.weights["w1"].double() * gamma).float())
    assert torch.equal(after.weights["b"], (program.weights["b"].double() / gamma).float())
    assert bool((after.weights["g"] == 1).all())


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (block(shared=True), "no product with a weight of its own reads it"),
        (block(gamma=-0.00001), ""),
    ],
)
def test_near_misses(program: Program, sentence: str) -> None:
    if not sentence:
        program.weights["g"][2] = 0.0
        sentence = "g is next to 0 somewhere, which the bias would be divided by"
    after = migrated(program)
    record = after.history.records[-1]
    assert not record.applied and record.declined[0].reason == sentence


def test_pre_norms_are_left_to_other_passes() -> None:
    program = pipeline("raise", verify="structure").run(captured("llama", "sdpa"))
    record = migrated(program).history.records[-1]
    assert not record.applied
    assert all("fold_norms or smooth" in declined.reason for declined in record.declined)
