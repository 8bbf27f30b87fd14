"""clip_weights: ranges chosen group by group by the exact error of the rounded outputs."""

from __future__ import annotations

from typing import Any

import build
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.ir.errors import WrongOption
from planish.ir.formats import AffineInt
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.clip_weights import ClipWeights, clip_groups
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights
from torch import Tensor

WIDE, OUT, TOKENS = 20, 7, 400


def layer(transposed: bool = False) -> Program:
    """One product [7, 20] with a few weights far from the rest."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(OUT, WIDE, generator=generator)
    weight[2, 5], weight[4, 11] = 6.0, -5.0
    if transposed:
        return build.program(
            lambda x, w: op.mm(x, w), {"x": torch.randn(TOKENS, WIDE)}, {"w": weight.t().clone()}
        )
    return build.program(
        lambda x, w: op.linear(x, w), {"x": torch.randn(TOKENS, WIDE)}, {"w": weight}
    )


def batches(count: int = 3) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(8)
    return [[torch.randn(TOKENS, WIDE, generator=generator)] for _ in range(count)]


def clipped(program: Program, **options: Any) -> Program:
    step = ClipWeights().with_options({"bits": 3, "group_size": 8, "remainder": "short"} | options)
    return Pipeline([step]).run(program, calibration=batches())


def output_error(program: Program, reference: Program) -> float:
    step = QuantizeWeights(bits=3, group_size=8, remainder="short")
    rounded = Pipeline([step]).run(program)
    return sum(float((run(rounded, b)[0] - run(reference, b)[0]).square().sum()) for b in batches())


@pytest.mark.parametrize("transposed", [False, True])
def test_clipping_lowers_the_error_of_the_rounded_layer(transposed: bool) -> None:
    program = layer(transposed)
    after = clipped(program)
    assert program_text(after) == program_text(program)
    before, cut = program.weights["w"], after.weights["w"]
    changed = cut != before
    assert 0 < float(changed.float().mean()) < 0.3
    assert bool((cut.abs() <= before.abs()).all())
    assert output_error(after, program) < 0.97 * output_error(program, program)
    (record,) = after.history.records[-1].applied
    assert record.note.endswith("% of it clipped")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.sampled_from([4, 5, 8]), st.integers(2, 4))
def test_no_group_gets_worse(seed: int, size: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 13, generator=generator)
    rows = torch.randn(9, 16 if size != 5 else 15, generator=generator)
    groups = -(-13 // size)
    rows = rows[:, : groups * size].clone()
    rows[:, 13:] = 0
    parts = rows.reshape(9, groups, size).transpose(0, 1)
    moments = torch.bmm(parts.transpose(1, 2), parts) / 9
    fmt = AffineInt(bits, size, True)

    def rounded(values: Tensor) -> Tensor:
        return fmt.encode(values).decode()

    kept = clip_groups(weight, moments, [1.0, 0.8, 0.6], rounded)
    for group in range(groups):
        at = slice(group * size, min((group + 1) * size, 13))
        x = rows[:, at].double()
        before, after = (
            (x @ (rounded(w) - weight)[:, at].double().t()).square().sum(0) for w in (weight, kept)
        )
        assert bool((after <= before * (1 + 1e-4) + 1e-9).all())


def test_what_is_not_planned_stays() -> None:
    program = layer()
    after = clipped(program, overrides="w=none")
    assert torch.equal(after.weights["w"], program.weights["w"])
    assert after.history.records[-1].declined[0].reason == "set to none by the option overrides"
    with pytest.raises(WrongOption, match="leave nothing to try"):
        ClipWeights(points=1)
