"""quantize_activations: one pair a value, which products read it, schemes, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from captured import captured
from planish.ir.capture import capture_module
from planish.ir.errors import (
    CalibrationTooSmall,
    NonFiniteActivation,
    UnknownOption,
    WrongOption,
    WrongOrder,
)
from planish.ir.interpret import run
from planish.ir.numerics import sqnr
from planish.ir.program import Program
from planish.ir.program_folder import load_program, save_program
from planish.ir.text import program_text
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_activations import SCHEMES, QuantizeActivations
from planish.passes.quantize_weights import QuantizeWeights
from planish.recipes import pipeline
from torch import Tensor, nn


class Heads(nn.Module):
    """Two products that read one value, one of its sum with another, and one dense head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(6, 10), nn.Linear(6, 10, bias=False)
        self.o = nn.Linear(10, 5)
        self.gain = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.gain
        return self.o(torch.relu(self.q(y) + self.k(y)))


def heads() -> Program:
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))
    return capture_module(Heads().eval(), (x,))


def quantize(program: Program, **options: Any) -> Program:
    flat = list(program.examples)
    steps = [QuantizeWeights(), QuantizeActivations(**options)]
    return Pipeline(steps, verify="numbers").run(program, calibration=[flat])


def test_one_pair_for_a_value_and_all_its_products() -> None:
    assert program_text(quantize(heads())).splitlines()[1:] == [
        "%mul = mul(%x, %gain) : f32[n0, 3, 6]",
        "%activation_scale = activation_scale(%mul, 'token', True) : f32[n0, 3, 1]",
        "%quantize = quantize(%mul, %activation_scale, None) : i8[n0, 3, 6]",
        "%dequantize = dequantize(%quantize, %activation_scale, None, dtype=f32) : f32[n0, 3, 6]",
        "%q = linear(%dequantize, %q.weight, %q.bias) : f32[n0, 3, 10]",
        "%k = linear(%dequantize, %k.weight) : f32[n0, 3, 10]",
        "%add = add(%q, %k) : f32[n0, 3, 10]",
        "%relu = relu(%add) : f32[n0, 3, 10]",
        "%activation_scale_1 = activation_scale(%relu, 'token', True) : f32[n0, 3, 1]",
        "%quantize_1 = quantize(%relu, %activation_scale_1, None) : i8[n0, 3, 10]",
        "%dequantize_1 = dequantize(%quantize_1, %activation_scale_1, None, dtype=f32) : "
        "f32[n0, 3, 10]",
        "%o = linear(%dequantize_1, %o.weight, %o.bias) : f32[n0, 3, 5]",
        "return [%o]",
    ]


def test_a_static_scale_and_zero_point_are_weights_of_the_first_reader(tmp_path: Path) -> None:
    before = heads()
    after = quantize(before, scheme="static_tensor", symmetric=False)
    y = before.examples[0]
    scale = after.weights["q.input_scale"]
    low, high = min(y.min().item(), 0), max(y.max().item(), 0)
    assert scale.item() == pytest.approx((high - low) / 255)
    zero = after.weights["q.input_zero_point"]
    assert zero.dtype == torch.int32 and zero.item() == round(-low / scale.item()) - 128
    assert {n for n in after.weights if "input" in n} == {
        f"{layer}.input_{kind}" for layer in "qo" for kind in ("scale", "zero_point")
    }
    loaded = load_program(save_program(after, tmp_path / "saved"))
    assert torch.equal(run(loaded, [y])[0], run(after, [y])[0])


def test_products_with_dense_weights_go_on_reading_floats() -> None:
    program, x = heads(), heads().examples[0]
    steps = [QuantizeWeights(skip="k.weight"), QuantizeActivations()]
    after = Pipeline(steps).run(program)
    text = program_text(after)
    assert "%k = linear(%mul, %k.weight)" in text and "%q = linear(%dequantize, %q.w" in text
    (declined,) = after.history.records[-1].declined
    assert declined.sentence() == (
        "quantize_activations: k: %k: its weight k.weight is dense, so it computes in floats anyway"
    )
    everything = Pipeline([QuantizeActivations(only="all")]).run(program)
    assert not everything.history.records[-1].declined
    assert 30 < sqnr(run(program, [x])[0], run(everything, [x])[0]) < 60


def test_layers_are_left_out_or_get_a_scheme_of_their_own() -> None:
    text = program_text(quantize(heads(), skip="o", overrides="k=dynamic_tensor"))
    assert "'token'" in text and "'tensor'" in text and "%o = linear(%relu, %o.weight" in text
    with pytest.raises(UnknownOption, match="no layer is called 'kk'"):
        quantize(heads(), overrides="kk=none")
    for wrong in ({"scheme": "static"}, {"overrides": "k=static"}, {"observer": "max"}):
        with pytest.raises(UnknownOption, match="did you mean"):
            QuantizeActivations(**wrong)
    for wrong in ({"overrides": "k"}, {"threshold": 0.0}, {"percentile": 10.0}, {"leave_out": -1}):
        with pytest.raises(WrongOption):
            QuantizeActivations(**wrong)  # type: ignore[arg-type]


def test_only_static_scales_need_calibration() -> None:
    program = heads()
    Pipeline([QuantizeWeights(), QuantizeActivations()]).run(program)
    for options in ({"scheme": "static_tensor"}, {"overrides": "q=static_tensor"}):
        with pytest.raises(WrongOrder, match="needs calibration"):
            Pipeline([QuantizeWeights(), QuantizeActivations(**options)]).run(program)
    with pytest.raises(CalibrationTooSmall):
        quantize_on(program, [[torch.empty(0, 3, 6)]])


def quantize_on(program: Program, batches: list[list[Tensor]], **options: Any) -> Program:
    steps = [QuantizeWeights(), QuantizeActivations(scheme="static_tensor", **options)]
    return Pipeline(steps).run(program, calibration=batches)


def test_the_first_nan_of_calibration_is_named() -> None:
    fine, bad = torch.ones(1, 3, 6), torch.ones(1, 3, 6)
    bad[0, 1, 2] = float("nan")
    with pytest.raises(NonFiniteActivation, match="batch 1 makes %mul NaN"):
        quantize_on(heads(), [[fine], [bad]])


def test_positions_left_out_do_not_count() -> None:
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(2))
    x[:, 0] *= 100
    with_first, without = (
        quantize_on(heads(), [[x]], leave_out=n).weights["q.input_scale"].item() for n in (0, 1)
    )
    assert without < with_first / 10
    assert without == pytest.approx(x[:, 1:].abs().max().item() / 127)


@pytest.mark.parametrize("value", [0.0, 2.0])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_constant_activations(scheme: str, value: float) -> None:
    program, x = heads(), torch.full((2, 3, 6), value)
    steps = [QuantizeWeights(), QuantizeActivations(scheme=scheme)]
    after = Pipeline(steps).run(program, calibration=[[x]])
    weights = Pipeline([QuantizeWeights()]).run(program)
    assert sqnr(run(weights, [x])[0], run(after, [x])[0]) > 40


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"scheme": "dynamic_tensor", "symmetric": False}),
        ("llama", {"scheme": "llm_int8", "threshold": 2.0}),
        ("gpt2", {"scheme": "static_tensor"}),
        ("bert", {"symmetric": False}),
    ],
)
def test_real_graphs_round_every_product_once(name: str, options: dict[str, Any]) -> None:
    before = pipeline("exact").run(captured(name))
    after = quantize(before, **options)
    weights, record = after.history.records[-2:]
    layers = [layer for e in record.applied for layer in e.note.split("read by ")[1].split(", ")]
    assert sorted(layers) == sorted(entry.before.rpartition(".")[0] for entry in weights.applied)
    assert len({entry.before for entry in record.applied}) == len(record.applied)
    flat = list(before.examples)
    assert 20 < sqnr(run(before, flat)[0], run(after, flat)[0]) < 80
