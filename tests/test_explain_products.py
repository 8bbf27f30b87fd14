"""explain names what computes each product of a quantized program."""

from __future__ import annotations

import pytest
import torch
from captured import captured
from planish import explain, optimize
from planish.codegen.explain_products import grouped, product_sentences
from planish.ir.capture import capture_module
from planish.kernels import native
from planish.kernels.linear_w8a8_cpu import SOURCE
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_activations import QuantizeActivations
from planish.passes.quantize_weights import QuantizeWeights
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    isinstance(native.library(SOURCE), str), reason="no C compiler on this machine"
)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu())


def test_every_product_of_a_mixed_recipe_is_named() -> None:
    program = capture_module(Mixed().eval(), (torch.randn(2, 3, 32),))
    weights = QuantizeWeights(overrides="b=int4-g16-asym; c=fp8-e4m3-channel; d=none")
    steps = [weights, QuantizeActivations(skip="b, d", overrides="a=llm_int8")]
    after = Pipeline(steps).run(program)
    assert product_sentences(after) == [
        "%a: linear_llm_int8_cpu on int8-channel-sym-f32, int8 activations, "
        "outlier columns in floats",
        "%b: linear_affine on int4-g16-asym",
        "%c: fp8-e4m3-channel decoded to f32 because the values of fp8-e4m3-channel "
        "lie on no grid of equal steps",
        "%d: f32 product, its weight is dense",
    ]
    everything = Pipeline([weights, QuantizeActivations(only="all")]).run(program)
    told = product_sentences(everything)
    assert told[1] == "%b: linear_w8a8_cpu on int4-g16-asym, int8 activations"
    assert told[2].endswith("rounded to int8 first: the values of fp8-e4m3-channel lie on no grid "
                            "of equal steps")  # fmt: skip
    assert told[3] == "%d: f32 product, its weight is dense; activations are rounded to int8 first"


def test_layers_that_differ_in_their_number_are_one_line() -> None:
    told = ["%layers.0.up: a", "%layers.0.down: b", "%layers.1.up: a", "%layers.12.up: a", "%h: c"]
    assert grouped(told) == ["3 x %layers.*.up: a", "%layers.0.down: b".replace("0", "*"), "%h: c"]


def test_the_report_shows_them() -> None:
    done = optimize(captured("llama"), recipe="llm-int8")
    shown = str(explain(done))
    assert "products with weights, on the CPU:" in shown
    assert " x %model.layers.*." in shown and "linear_llm_int8_cpu on int8-channel-sym" in shown
    assert explain(done).to_json()["kernels"]
    assert "products with weights" not in str(explain(optimize(captured("llama"))))
