"""Products on rounded activations in the torch target: integers, shared codes, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured import captured
from planish.codegen.torch_cpu import compile_program, lower
from planish.ir.capture import capture_module
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.kernels import native
from planish.kernels.linear_w8a8_cpu import SOURCE
from planish.passes.canonicalize import Canonicalize
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_activations import QuantizeActivations
from planish.passes.quantize_weights import QuantizeWeights
from planish.recipes import pipeline
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    isinstance(native.library(SOURCE), str), reason="no C compiler on this machine"
)
EPS = 2.0**-24


class Pair(nn.Module):
    """Two products on one value and one on their sum; addmm on a flattened view of that."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(36, 20), nn.Linear(36, 20, bias=False)
        self.o, self.shift = nn.Parameter(torch.randn(20, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.tanh(self.q(x) + self.k(x))
        return torch.addmm(self.shift, both.view(-1, 20), self.o).view(*x.shape[:-1], 7)


def pair(dtype: torch.dtype = torch.float32) -> Program:
    x = torch.randn(2, 3, 36, generator=torch.Generator().manual_seed(1)).to(dtype)
    return capture_module(Pair().eval().to(dtype), (x,))


def quantize(program: Program, fmt: str = "int8-channel-sym", **options: Any) -> Program:
    steps = [QuantizeWeights(format=fmt, remainder="short"), QuantizeActivations(**options)]
    return Pipeline(steps).run(program, calibration=[list(program.examples)])


def targets(program: Program) -> list[str]:
    module = lower(program)
    names = (str(node.target) for node in module.graph.nodes if node.op == "call_function")
    return [name.removeprefix("planish.").split(".")[0] for name in names if "planish" in name]


def test_codes_are_made_once_for_all_that_read_them() -> None:
    program = quantize(pair())
    assert targets(program) == [
        "quantize_rows_cpu",
        "linear_w8a8_cpu",
        "linear_w8a8_cpu",
        "quantize_rows_cpu",
        "linear_w8a8_cpu",
    ]
    assert lower(program).meta["choices"] == [
        f"%{name} (int8 activations) on int8-channel-sym multiplies integers: linear_w8a8_cpu"
        for name in ("q", "k", "addmm")
    ]


@pytest.mark.parametrize(
    "fmt",
    [
        "int8-channel-sym",
        "int4-g16-asym",
        "int4-g16-offset",
        "int8-channel-sym+columns9%",
        "int4-g16-sym+sparse3%",
        "ternary-channel",
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "dynamic_token"},
        {"scheme": "dynamic_token", "symmetric": False},
        {"scheme": "dynamic_tensor"},
        {"scheme": "static_tensor", "symmetric": False},
        {"scheme": "llm_int8", "threshold": 2.0},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_lowered_program_means_the_same(fmt: str, options: dict[str, Any]) -> None:
    program = quantize(pair(), fmt, **options)
    module = lower(program)
    assert all("multiplies integers" in s for s in module.meta["choices"])
    for batch in (1, 2, 15):
        x = torch.randn(batch, 3, 36, generator=torch.Generator().manual_seed(batch))
        exact = run(program, [x], float64=True)[0]
        single = run(program, [x])[0]
        with torch.no_grad():
            found = module(x)[0]
        # Both round in float32; a value next to a tie may take the neighbouring code in either.
        step = (exact - single).abs().max().item() + 64 * EPS * exact.abs().max().item()
        near_tie = 0.02 * exact.abs().max().item()
        gap = (found - exact).abs()
        assert gap.max().item() <= near_tie and gap.median().item() <= 8 * step


def test_floats_are_multiplied_where_integers_cannot_be_and_it_is_told() -> None:
    everything = Pipeline([QuantizeActivations(only="all")]).run(pair())
    told = lower(everything).meta["choices"]
    assert told == [
        f"%{name} (int8 activations) multiplies floats because its weight is dense"
        for name in ("q", "k", "addmm")
    ]
    program = quantize(pair(), "nf4-g4", only="all")
    told = lower(program).meta["choices"]
    assert "multiplies floats because the values of nf4-g4 lie on no grid" in told[0]


def test_half_precision_comes_back_in_half_precision() -> None:
    program = quantize(pair(torch.bfloat16))
    module = lower(program)
    x = program.examples[0]
    with torch.no_grad():
        found = module(x)[0]
    exact = run(program, [x], float64=True)[0]
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm().item() <= 2.0**-6 * exact.norm().item()


class Tied(nn.Module):
    """A table whose rows are looked up, and multiplied as a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 24)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.relu(self.table(ids)) @ self.table.weight.t()


def test_a_table_and_its_head_share_the_packed_codes() -> None:
    ids = torch.arange(12).reshape(3, 4)
    before = capture_module(Tied(), (ids,))
    steps = [QuantizeWeights(embeddings="int8-channel-sym-f32"), QuantizeActivations()]
    program = Pipeline([Canonicalize(), *steps]).run(before)
    module = lower(program)
    assert targets(program) == ["rows_affine", "quantize_rows_cpu", "linear_w8a8_cpu"]
    assert len([name for name, _ in module.named_buffers()]) == 2
    with torch.no_grad():
        found = module(ids)[0]
    exact = run(program, [ids], float64=True)[0]
    assert (found - exact).abs().max().item() <= 64 * EPS * exact.abs().max().item()


@pytest.mark.parametrize(
    "scheme", ["dynamic_token", pytest.param("llm_int8", marks=pytest.mark.slow)]
)
def test_a_real_model_compiled(scheme: str) -> None:
    before = pipeline("exact").run(captured("llama"))
    program = quantize(before, scheme=scheme, threshold=2.0)
    flat = list(program.examples)
    exact = run(program, flat, float64=True)[0]
    rounding = (run(program, flat)[0] - exact).norm().item()
    found = compile_program(program)(*flat)[0]
    # A value next to a tie may take the neighbouring code, a step of one of its row's 127.
    assert (found - exact).norm().item() <= 8 * rounding + 0.01 * exact.norm().item()
