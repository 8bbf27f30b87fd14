"""Learned rounding: never worse than its grid's nearest values, and mostly much better."""

from __future__ import annotations

import pytest
import torch
from captured import captured
from planish.ir.affine import grouped
from planish.ir.formats import parse_format
from planish.ir.hessian import Hessian, damped, output_error
from planish.ir.interpret import run
from planish.ir.numerics import sqnr
from planish.passes.calibrated_weights import Problem
from planish.passes.group_grids import GroupGrids
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_rounding import QuantizeRounding
from planish.passes.quantize_weights import QuantizeWeights


@pytest.mark.parametrize(
    "name", ["int3-g16-sym", "int4-g16-asym", "int3-channel-sym", "int3-g7-sym"]
)
def test_learned_rounding_is_no_worse_than_nearest(name: str) -> None:
    made = torch.Generator().manual_seed(4)
    inputs = torch.randn(300, 40, generator=made) @ torch.randn(40, 40, generator=made)
    found = Hessian(40)
    found.add(inputs)
    hessian = damped(found.mean(), 0.01)[0]
    weight = torch.randn(6, 40, generator=made)
    fmt = parse_format(name)
    problem = Problem(weight, hessian, fmt, torch.float32, "w")
    solution = QuantizeRounding(steps=100).solve(problem)
    again = fmt.encode_on(solution.values, solution.grid).decode()
    assert (again - solution.values).abs().max() <= 1e-6 * weight.abs().max()
    grids = GroupGrids(fmt, 40, torch.float32, "w")
    grids.fix_all(weight, hessian.diagonal())
    nearest = grids.grid().nearest(grouped(weight, grids.size)).flatten(1)[:, :40]
    ours = output_error((again - weight).double(), hessian)
    theirs = output_error((nearest - weight).double(), hessian)
    assert bool((ours <= theirs * (1 + 1e-6)).all())
    assert float(ours.sum()) < 0.8 * float(theirs.sum())


def test_a_real_graph() -> None:
    before = captured("gpt2")
    flat = list(before.examples)
    step = QuantizeRounding(bits=3, group_size=16, steps=60)
    after = Pipeline([step], verify="numbers").run(before, calibration=[flat])
    plain = Pipeline([QuantizeWeights(bits=3, group_size=16)]).run(before)
    exact = run(before, flat, float64=True)[0]
    assert sqnr(exact, run(after, flat)[0]) > sqnr(exact, run(plain, flat)[0])
