"""Quantized activations in ONNX: integer products with the program's meaning, for every scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_checks import domains, exported, graph_of, op_counts, run_exported
from planish.codegen.run_onnx import OnnxModel
from planish.ir.capture import capture_module
from planish.ir.interpret import run
from planish.ir.program import Program
from planish.passes.pipeline import Pipeline
from planish.passes.quantize_activations import QuantizeActivations
from planish.passes.quantize_weights import QuantizeWeights
from torch import Tensor, nn

EPS = 2.0**-24
SCHEMES: list[dict[str, Any]] = [
    {"scheme": "dynamic_token"},
    {"scheme": "dynamic_token", "symmetric": False},
    {"scheme": "dynamic_tensor"},
    {"scheme": "dynamic_tensor", "symmetric": False},
    {"scheme": "static_tensor"},
    {"scheme": "static_tensor", "symmetric": False},
    {"scheme": "llm_int8", "threshold": 2.0},
    {"scheme": "llm_int8", "threshold": 100.0},
]


class Two(nn.Module):
    """Two linears on one value, one with a bias, and addmm on a flattened view of their sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(36, 20), nn.Linear(36, 20, bias=False)
        self.o, self.shift = nn.Parameter(torch.randn(20, 7)), nn.Parameter(torch.randn(7))

    def forward(self, x: Tensor) -> Tensor:
        both = torch.tanh(self.q(x) + self.k(x))
        return torch.addmm(self.shift, both.view(-1, 20), self.o).view(*x.shape[:-1], 7)


def two() -> Program:
    x = torch.randn(2, 3, 36, generator=torch.Generator().manual_seed(1))
    return capture_module(Two().eval(), (x,))


def quantize(program: Program, fmt: str = "int8-channel-sym", **options: Any) -> Program:
    steps = [QuantizeWeights(format=fmt, remainder="short"), QuantizeActivations(**options)]
    return Pipeline(steps).run(program, calibration=[list(program.examples)])


def near(program: Program, found: Tensor, flat: list[Tensor]) -> bool:
    """Equal to rounding; a value next to a tie may take the neighbouring code in either run."""
    exact, single = run(program, flat, float64=True)[0], run(program, flat)[0]
    size = exact.abs().max().item()
    gap = (found - exact).abs()
    rounding = (single - exact).abs().max().item() + 64 * EPS * size
    return gap.max().item() <= 0.02 * size and gap.median().item() <= 8 * rounding


@pytest.mark.parametrize(
    ("fmt", "profile"),
    [
        ("int8-channel-sym", "ort"),
        ("int8-channel-asym", "standard"),
        ("int8-channel-sym+columns9%", "ort"),
    ],
)
@pytest.mark.parametrize(
    "options", SCHEMES, ids=lambda options: "-".join(map(str, options.values()))
)
def test_integers_are_multiplied_and_mean_the_same(
    tmp_path: Path, fmt: str, options: dict[str, Any], profile: str
) -> None:
    program = quantize(two(), fmt, **options)
    folder = exported(program, tmp_path / "out", profile=profile)
    counts = op_counts(folder)
    assert counts["MatMulIntegerToFloat"] + counts["MatMulInteger"] == 3
    assert counts["QuantizeLinear"] + counts["DynamicQuantizeLinear"] == 2  # once a value
    if profile == "standard":
        assert domains(folder) == {""}
    for batch in (1, 4):
        x = torch.randn(batch, 3, 36, generator=torch.Generator().manual_seed(batch))
        assert near(program, run_exported(program, folder, [x])[0], [x])


def test_activations_are_unsigned_bytes(tmp_path: Path) -> None:
    """onnxruntime multiplies signed bytes by signed ones many times slower."""
    folder = exported(quantize(two()), tmp_path / "out")
    stored = {tensor.name: tensor for tensor in graph_of(folder).initializer}
    for node in graph_of(folder).node:
        if node.op_type == "MatMulIntegerToFloat":
            assert stored[node.input[1]].data_type == 3 and stored[node.input[4]].data_type == 2


def test_values_past_a_static_range_are_held_as_in_the_program(tmp_path: Path) -> None:
    program = quantize(two(), scheme="static_tensor")
    folder = exported(program, tmp_path / "out")
    x = -10 * program.examples[0].abs()
    assert near(program, run_exported(program, folder, [x])[0], [x])


def test_rows_of_zeros(tmp_path: Path) -> None:
    program = quantize(two())
    folder = exported(program, tmp_path / "out")
    x = torch.randn(3, 3, 36, generator=torch.Generator().manual_seed(2))
    x[0, 1] = 0
    assert near(program, run_exported(program, folder, [x])[0], [x])


def test_weights_in_groups_multiply_floats_and_it_is_told(tmp_path: Path) -> None:
    program = quantize(two(), "int4-g16-asym")
    folder = exported(program, tmp_path / "out")
    assert not op_counts(folder)["MatMulIntegerToFloat"]
    notes = OnnxModel(folder, threads=1).metadata["planish.notes"]
    assert (
        notes.count("multiplies floats because onnxruntime's integer products take one scale") == 3
    )
    x = program.examples[0]
    assert near(program, run_exported(program, folder, [x])[0], [x])
