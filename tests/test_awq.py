"""awq: factors chosen by the exact output error of the rounded products; the function stays."""

from __future__ import annotations

from typing import Any

import build
import pytest
import torch
from captured import captured, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.calibration import flat_batch
from planish.ir.errors import UnknownOption, WrongOption
from planish.ir.formats import AffineInt, parse_format
from planish.ir.hessian import Hessian
from planish.ir.interpret import run
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.awq import Awq, factors_of, scaled_error
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights
from planish.recipes import pipeline
from torch import Tensor

WIDE, HIDDEN, OUT, TOKENS = 6, 16, 7, 40


def mlp() -> Program:
    """norm [6], fc1 [16, 6], ReLU, fc2 [7, 16]; two channels of fc1 carry much."""
    generator = torch.Generator().manual_seed(5)
    weights = {
        "norm.w": torch.rand(WIDE, generator=generator) + 0.5,
        "fc1.w": torch.randn(HIDDEN, WIDE, generator=generator),
        "fc2.w": torch.randn(OUT, HIDDEN, generator=generator),
    }
    weights["fc1.w"][[3, 11]] *= 30

    def body(x: Any, norm: Any, fc1: Any, fc2: Any) -> Any:
        return op.linear(op.relu(op.linear(op.rms_norm(x, norm, 1e-5), fc1)), fc2)

    return build.program(body, {"x": torch.randn(TOKENS, WIDE)}, weights)


def batches(count: int = 3) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(8)
    return [[torch.randn(TOKENS, WIDE, generator=generator)] for _ in range(count)]


def scaled(program: Program, given: list[Any], **options: Any) -> Program:
    step = Awq().with_options({"group_size": 8, "remainder": "short"} | options)
    return Pipeline([step], verify="numbers").run(program, probes=given[:1], calibration=given)


def output_error(program: Program, reference: Program, given: list[Any], **options: Any) -> float:
    step = QuantizeWeights().with_options(
        {"bits": 4, "group_size": 8, "remainder": "short", "scale_dtype": "float32"} | options
    )
    rounded = Pipeline([step]).run(program)
    return sum(float((run(rounded, b)[0] - run(reference, b)[0]).square().sum()) for b in given)


def test_channels_that_carry_much_get_finer_steps() -> None:
    program, given = mlp(), batches()
    after = scaled(program, given, bits=3)
    assert program_text(after) == program_text(program)
    ratio = after.weights["fc2.w"] / program.weights["fc2.w"]
    factors = ratio.mean(0)
    assert factors[[3, 11]].min() > factors[[0, 1, 2, 4, 5]].max()
    assert output_error(after, program, given, bits=3) < output_error(
        program, program, given, bits=3
    )
    notes = [record.note for record in after.history.records[-1].applied]
    assert any(note.startswith("fc1->fc2; r 0.") and "output error 0." in note for note in notes)


def test_the_objective_is_the_squared_output_error() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 12, generator=generator)
    w = torch.randn(5, 12, generator=generator)
    s = torch.rand(12, generator=generator, dtype=torch.float64) + 0.5
    fmt = AffineInt(3, 4, True)
    hessian = Hessian(12)
    hessian.add(x)
    found = scaled_error(w, s, fmt, hessian.mean())
    error = fmt.encode(w * s.float()).decode() / s.float() - w
    wanted = float((x.double() @ error.double().t()).square().sum()) / 50
    assert found == pytest.approx(wanted, rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.05, 0.5, 0.95]), st.booleans())
def test_factors_are_positive_and_even_out(seed: int, ratio: float, by_weights: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(9, generator=generator).abs() * (torch.arange(9) != seed % 9)
    weight = torch.rand(9, generator=generator) if by_weights else None
    factors = factors_of(data, ratio, weight)
    assert bool((factors > 0).all()) and factors[seed % 9] == 1
    live = factors[data > 0]
    assert float(live.amax() * live.amin()) == pytest.approx(1, rel=1e-9)


def test_edges_never_get_worse() -> None:
    """With 8 bits and even channels there is little to gain, and what is lost is left alone."""
    program, given = mlp(), batches()
    program.weights["fc1.w"][[3, 11]] /= 30
    after = scaled(program, given, bits=8)
    assert output_error(after, program, given, bits=8) <= 1.05 * output_error(
        program, program, given, bits=8
    )


def test_any_planned_format_is_aimed_at() -> None:
    program, given = mlp(), batches()
    after = scaled(program, given, overrides="fc2=none; fc1=int2-g2-sym")
    assert torch.equal(after.weights["fc2.w"], program.weights["fc2.w"])
    declined = [d.reason for d in after.history.records[-1].declined]
    assert "nothing that reads these channels will be quantized" in declined
    nf4 = scaled(program, given, format="nf4-g8")
    assert parse_format("nf4-g8").name == "nf4-g8"
    assert not torch.equal(nf4.weights["fc2.w"], program.weights["fc2.w"])
    with pytest.raises(UnknownOption, match="fc3"):
        scaled(program, given, overrides="fc3=int4-g8-sym")
    with pytest.raises(WrongOption, match="points cannot be 1"):
        Awq(points=1)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_tiny_models_keep_their_function(name: str) -> None:
    program = pipeline("raise", verify="structure").run(captured(name, "sdpa"))
    tiny = sample(name, "sdpa")
    given = [flat_batch(program, tiny.kwargs), flat_batch(program, tiny.other_inputs())]
    step = Awq(group_size=16, remainder="short", points=5)
    after = Pipeline([step], verify="numbers").run(program, probes=given, calibration=given)
    kinds = {record.note.split(";")[0] for record in after.history.records[-1].applied}
    assert {"norm->linear", "v->o"} <= kinds
