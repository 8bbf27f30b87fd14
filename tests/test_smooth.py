"""smooth: the factors of SmoothQuant along every edge, folded; the function stays."""

from __future__ import annotations

from typing import Any

import build
import pytest
import torch
import zoo
from captured import captured, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from planish.calibration import flat_batch
from planish.ir.errors import CalibrationTooSmall, WrongOption
from planish.ir.interpret import run
from planish.ir.numerics import relative_error
from planish.ir.pattern import op
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.int8_error import int8_error, rounded
from planish.passes.pipeline import Pipeline
from planish.passes.smooth import Smooth, above, smoothing
from planish.recipes import pipeline
from torch import Tensor

WIDE, HIDDEN, OUT, TOKENS = 6, 10, 7, 9
ZOO = ("llama", "gpt2", "mixtral", "phi3", "opt", "t5")


def mlp(outlier: float = 1.0) -> Program:
    """Gated: up [10, 6], gate [10, 6], down [7, 10]; channel 3 of up is `outlier` times larger."""
    generator = torch.Generator().manual_seed(5)
    weights = {
        "gate.w": torch.randn(HIDDEN, WIDE, generator=generator),
        "up.w": torch.randn(HIDDEN, WIDE, generator=generator),
        "up.b": torch.randn(HIDDEN, generator=generator),
        "down.w": torch.randn(OUT, HIDDEN, generator=generator),
    }
    weights["up.w"][3] *= outlier
    weights["up.b"][3] *= outlier

    def body(x: Any, gate: Any, up: Any, bias: Any, down: Any) -> Any:
        y = op.gated(op.linear(x, gate), op.linear(x, up, bias), "silu")
        return op.linear(y, down)

    return build.program(body, {"x": torch.randn(TOKENS, WIDE)}, weights)


def batches(count: int = 3) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(8)
    return [[torch.randn(TOKENS, WIDE, generator=generator)] for _ in range(count)]


def hidden(program: Program, given: list[list[Tensor]]) -> Tensor:
    """What the last product reads, [tokens, 10]."""
    seen: list[Tensor] = []

    def watch(node: Any, value: Any) -> None:
        if node.target is torch.ops.planish.gated.default:
            seen.append(value)

    for batch in given:
        run(program, batch, watch=watch)
    return torch.cat(seen)


def smoothed(program: Program, given: list[Any], **options: Any) -> Program:
    step = Smooth().with_options(options)
    return Pipeline([step], verify="numbers").run(program, probes=given[:1], calibration=given)


def test_factors_are_those_of_the_paper() -> None:
    program, given = mlp(), batches()
    after = smoothed(program, given, alpha=0.75)
    data = hidden(program, given).abs().amax(0).double()
    weight = program.weights["down.w"].abs().amax(0).double()
    factors = data**0.75 / weight**0.25
    for name, wanted in {
        "up.w": program.weights["up.w"] / factors[:, None],
        "up.b": program.weights["up.b"] / factors,
        "down.w": program.weights["down.w"] * factors,
        "gate.w": program.weights["gate.w"].double(),
    }.items():
        assert torch.equal(after.weights[name], wanted.float()), name
    assert program_text(after) == program_text(program)


def test_alpha_one_evens_out_the_activations() -> None:
    given = batches()
    after = smoothed(mlp(outlier=50.0), given, alpha=1.0)
    assert torch.allclose(hidden(after, given).abs().amax(0), torch.ones(HIDDEN), atol=1e-5)


@pytest.mark.parametrize("activations", ["tensor", "token"])
def test_search_lowers_the_error_in_8_bits(activations: str) -> None:
    program, given = mlp(outlier=200.0), batches()
    after = smoothed(program, given, search=True, activations=activations)
    (first, *_) = after.history.records[-1].applied
    assert first.note.startswith("up->down; ")

    def error(of: Program) -> float:
        x, w = hidden(of, given), of.weights["down.w"]
        axis = {"tensor": None, "token": -1}[activations]
        most = x.abs().amax() if axis is None else x.abs().amax(-1, keepdim=True)
        steps = most / 127, w.abs().amax(-1, keepdim=True) / 127
        return float((rounded(x, steps[0]) @ rounded(w, steps[1]).t() - x @ w.t()).square().sum())

    assert error(after) < 0.5 * error(program)


def test_thresholds_touch_only_what_is_beyond() -> None:
    factors = above(torch.tensor([0.0, 1.0, 3.0, 12.0]), 3.0)
    assert torch.equal(factors, torch.tensor([1.0, 1.0, 1.0, 4.0], dtype=torch.float64))


def test_unused_channels_keep_their_weights() -> None:
    program = mlp()
    for name in ("up.w", "up.b"):
        program.weights[name][4] = 0
    program.weights["down.w"][:, 6] = 0
    after = smoothed(program, batches())
    assert torch.equal(after.weights["down.w"][:, 4], program.weights["down.w"][:, 4])
    assert torch.equal(after.weights["up.w"][6], program.weights["up.w"][6])
    assert all(bool(after.weights[name].isfinite().all()) for name in after.weights)


def test_kinds_are_chosen_by_name() -> None:
    program = mlp()
    after = smoothed(program, batches(), kinds="norm->linear, v->o")
    assert torch.equal(after.weights["up.w"], program.weights["up.w"])
    with pytest.raises(WrongOption, match="cannot hold 'up'"):
        Smooth(kinds="up")
    with pytest.raises(WrongOption, match="alpha cannot be"):
        Smooth(alpha=1.5)
    with pytest.raises(WrongOption, match="activations cannot be 'row'"):
        Smooth(activations="row")


def test_no_calibration_is_told() -> None:
    with pytest.raises(CalibrationTooSmall):
        smoothed(mlp(), [[torch.zeros(0, WIDE)]])


@pytest.mark.parametrize("name", ZOO)
def test_tiny_models_keep_their_function(name: str) -> None:
    """Held to the contract in float64 and float32 by the pipeline, at every output."""
    attention: zoo.Attention = "sdpa"
    program = pipeline("raise", verify="structure").run(captured(name, attention))
    tiny = sample(name, attention)
    given = [flat_batch(program, tiny.kwargs), flat_batch(program, tiny.other_inputs())]
    after = Pipeline([Smooth()], verify="numbers").run(program, probes=given, calibration=given)
    changed = [n for n in program.weights if after.weights.entry(n) is not program.weights.entry(n)]
    assert len(changed) >= 8
    wanted, found = run(program, given[1]), run(after, given[1])
    limit = 8 * max(
        relative_error(a, b)
        for a, b in zip(wanted, run(program, given[1], float64=True), strict=True)
    )
    assert max(relative_error(a, b) for a, b in zip(found, wanted, strict=True)) <= 2 * limit


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0, 1), st.booleans())
def test_moved_factors_change_only_the_rounding(seed: int, alpha: float, by_token: bool) -> None:
    """In 8 bits the error is that of rounding alone: it is bounded by half a step everywhere."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 12, generator=generator) * torch.logspace(-2, 2, 12)
    w = torch.randn(3, 12, generator=generator)
    factors = smoothing(x.abs().amax(0), w.abs().amax(0), alpha)
    spread = factors.float()
    found = int8_error(x, w, factors, x.abs().amax(0), by_token)
    step_x = (x / spread).abs().amax() / 127 / 2
    step_w = (w * spread).abs().amax(-1, keepdim=True) / 127 / 2
    bound = ((x / spread).abs() + step_x) @ step_w.expand(3, 12).t()
    bound = bound + step_x * (w * spread).abs().sum(-1)
    assert found <= float(bound.square().sum()) * (1 + 1e-5)
