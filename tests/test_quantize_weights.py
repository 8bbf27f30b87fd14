"""quantize_weights: which weights, along which axis, into which format, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from captured import captured
from planish.ir.capture import capture_module
from planish.ir.encoded import Encoded
from planish.ir.errors import NonFiniteWeight, UnsupportedGroupSize, WrongOption
from planish.ir.formats import AffineInt
from planish.ir.interpret import run
from planish.ir.numerics import sqnr
from planish.ir.program import Program
from planish.ir.text import program_text
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_weights import QuantizeWeights
from torch import Tensor, nn


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(11, 6)
        self.up = nn.Linear(6, 10, bias=False)
        self.down = nn.Parameter(torch.randn(10, 6))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.matmul(self.up(self.table(ids)), self.down) @ self.table.weight.t()


def small() -> Program:
    return capture_module(Small(), (torch.arange(6).reshape(2, 3),))


def quantize(program: Program, **options: object) -> Program:
    return Pipeline([QuantizeWeights(**options)], verify="numbers").run(program)  # type: ignore[arg-type]


def formats(program: Program) -> dict[str, str]:
    entries = {name: program.weights.entry(name) for name in program.weights}
    return {n: f"{e.format.name}@{e.axis}" for n, e in entries.items() if isinstance(e, Encoded)}


def test_the_graph_stays_and_each_weight_gets_the_axis_its_matmul_sums_over() -> None:
    before = small()
    after = quantize(before, bits=4, group_size=2, embeddings="int8-channel-sym")
    assert program_text(before) == program_text(after)
    assert formats(after) == {
        "table.weight": "int8-channel-sym@-1",
        "up.weight": "int4-g2-sym-f32@-1",
        "down": "int4-g2-sym-f32@-2",
    }
    assert isinstance(before.weights.entry("up.weight"), Tensor)
    assert after.nbytes() < before.nbytes()
    assert after.parameter_count() == before.parameter_count()


def test_tables_are_left_alone_unless_asked_and_the_reason_is_told() -> None:
    after = quantize(small(), bits=8)
    assert set(formats(after)) == {"up.weight", "down"}
    (declined,) = after.history.records[-1].declined
    assert declined.sentence() == (
        "quantize_weights: table: %table.weight: a looked-up table; the option embeddings is none"
    )


def test_skip_takes_patterns() -> None:
    assert set(formats(quantize(small(), skip="up.*, nothing"))) == {"down"}


def test_a_weight_that_is_also_added_is_left_alone() -> None:
    class Also(Small):
        def forward(self, ids: Tensor) -> Tensor:
            return self.up(self.table(ids)) @ self.down + self.down.sum(0)

    after = quantize(capture_module(Also(), (torch.zeros(2, 3, dtype=torch.long),)))
    reasons = {d.value: d.reason for d in after.history.records[-1].declined}
    assert "neither a matmul nor a look-up" in reasons["down"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 4, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width_on_a_real_graph(bits: int, group_size: int | None, symmetric: bool) -> None:
    before = captured("gpt2")
    after = quantize(before, bits=bits, group_size=group_size, symmetric=symmetric)
    assert after.history.records[-1].applied
    for name, spelled in formats(after).items():
        entry = after.weights.entry(name)
        assert isinstance(entry, Encoded)
        gap = (before.weights[name].double() - after.weights[name].double()).abs()
        assert bool((gap <= entry.worst_error()).all()), (name, spelled)
    measured = after.history.records[-1].measured[0]
    assert measured.after == min(
        sqnr(before.weights[name], after.weights[name]) for name in formats(after)
    )


def test_transposed_weights_of_a_real_model_group_along_the_summed_axis() -> None:
    axes = set(formats(quantize(captured("gpt2"), bits=4, group_size=16)).values())
    assert axes == {"int4-g16-sym-f32@-2"}


def test_three_axes_of_experts() -> None:
    found = formats(quantize(captured("mixtral"), bits=4, group_size=16, remainder="short"))
    experts = [n for n in found if n.endswith(("gate_up_proj", "down_proj"))]
    assert len(experts) == 4


def test_more_bits_give_nearer_outputs() -> None:
    before = captured("llama")
    flat = list(before.examples)
    exact = run(before, flat, float64=True)[0]
    found = [
        sqnr(exact, run(quantize(before, bits=b, group_size=20, remainder="short"), flat)[0])
        for b in (3, 4, 8)
    ]
    assert found[0] < found[1] < found[2]


def test_a_group_size_that_does_not_divide_names_the_layer_and_offers_ways_out() -> None:
    program = captured("llama")
    with pytest.raises(UnsupportedGroupSize) as caught:
        quantize(program, bits=4, group_size=32)
    told = str(caught.value)
    assert "model.layers.0.self_attn.q_proj.weight" in told
    assert "group_size=16" in told
    assert "per channel" in told
    assert "remainder=short" in told
    assert not formats(program)
    assert formats(quantize(program, bits=4, group_size=32, remainder="short"))


def test_a_weight_that_is_not_finite_is_named() -> None:
    model = Small()
    with torch.no_grad():
        model.up.weight[3, 2] = float("nan")
    with pytest.raises(NonFiniteWeight, match=r"up\.weight"):
        quantize(capture_module(model, (torch.zeros(2, 3, dtype=torch.long),)))


def test_options_are_checked_when_the_pass_is_made() -> None:
    for wrong in ({"bits": 9}, {"remainder": "maybe"}, {"scale_dtype": "int8"}):
        with pytest.raises(WrongOption):
            QuantizeWeights(**wrong)  # type: ignore[arg-type]


def test_scales_in_the_models_own_dtype() -> None:
    program = capture_module(Small().bfloat16(), (torch.arange(6).reshape(2, 3),))
    entry = quantize(program, bits=4, group_size=2, scale_dtype="weight").weights.entry("up.weight")
    assert isinstance(entry, Encoded)
    assert entry.format == AffineInt(4, 2)
    assert entry.scale.dtype == torch.bfloat16
