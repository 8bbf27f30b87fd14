"""Every format in ONNX: onnxruntime computes what the program does, and files stay small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from coded_model import IDS, coded, in_format
from onnx_checks import assert_equal_to_rounding, exported, graph_of, op_counts
from planish.codegen.onnx_builder import Options
from planish.codegen.onnx_lower import lower
from planish.codegen.target import export_program
from planish.ir.capture import capture_module
from planish.ir.encoded import Encoded
from planish.ir.formats import parse_format
from planish.ir.program import Program
from torch import nn

CODED = ["nf4", "nf4-g16-plain", "fp4", "kmeans4-tensor", "kmeans3-g24-f16", "kmeans2-channel",
         "gobo3", "mxfp4", "mxfp6-e3m2", "mxfp8", "mxfp8-e5m2", "nvfp4", "fp8-e4m3-tensor",
         "fp8-e5m2-channel", "fp8-e4m3-g32-f16"]  # fmt: skip
AFFINE = ["ternary-tensor", "ternary-g16-f16", "binary-channel", "int4-g32-offset",
          "int3-channel-offset-f16", "int4-g16-offset-k", "int4-g32-sym+sparse2%",
          "int4-g32-asym+columns5%", "int4-g32-offset+sparse1%+columns4%"]  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> Program:
    return coded()


def notes(program: Program) -> list[str]:
    """What the lowering says of weights that are not read as integers."""
    return lower(program, Options()).notes


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.parametrize("name", [*CODED, *AFFINE])
def test_onnxruntime_equals_the_program(
    plain: Program, name: str, profile: str, tmp_path: Path
) -> None:
    program = in_format(plain, parse_format(name))
    folder = exported(program, tmp_path / "out", profile=profile)
    assert_equal_to_rounding(program, folder, [IDS])


@pytest.mark.parametrize("name", ["nf4", "int4-g32-offset-f16", "int4-g32-sym+sparse2%", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float16])
def test_in_half_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    program = in_format(coded(dtype=dtype), parse_format(name), parse_format("int8-channel-sym"))
    folder = exported(program, tmp_path / "out")
    assert_equal_to_rounding(program, folder, [IDS])


def test_signs_are_packed_products(plain: Program, tmp_path: Path) -> None:
    program = in_format(plain, parse_format("ternary-tensor"))
    nodes = graph_of(exported(program, tmp_path / "out")).node
    bits = [
        a.i for n in nodes if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "bits"
    ]
    assert bits == [4, 4, 4]  # onnxruntime's own 2-bit product is slow
    assert notes(program) == []


@pytest.mark.parametrize("name", ["int4-g32-offset", "int4-g32-sym+columns5%"])
def test_additions_keep_the_packed_product(plain: Program, name: str, tmp_path: Path) -> None:
    program = in_format(plain, parse_format(name), parse_format("int8-channel-sym"))
    assert op_counts(exported(program, tmp_path / "out"))["MatMulNBits"] == 3
    assert notes(program) == []


def test_what_stays_dense_is_told(plain: Program, tmp_path: Path) -> None:
    program = in_format(plain, parse_format("nf4+columns5%"))
    exported(program, tmp_path / "out")
    program = in_format(plain, parse_format("int4-g32-sym+sparse2%"))
    assert notes(program) == [
        "table.weight: not read as integers because a look-up reads values beside the base"
    ]


@pytest.mark.parametrize(
    ("name", "bits"),
    [("nf4", 4.2), ("fp4-plain", 4.6), ("mxfp4", 4.6), ("nvfp4", 5.1), ("kmeans4-tensor", 4.1),
     ("gobo3", 4.6), ("fp8-e4m3-channel", 8.2), ("mxfp8", 8.6), ("ternary-g64-f16", 2.4),
     ("int4-g64-offset-f16", 5.1), ("int4-g64-sym-f16+sparse0.5%", 4.9)],
)  # fmt: skip
def test_the_file_is_as_small_as_the_format(name: str, bits: float, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(640, 512, bias=False), nn.Linear(512, 192, bias=False))
    program = capture_module(model, (torch.randn(3, 640),))
    for weight in list(program.weights):
        program.weights[weight] = parse_format(name).encode(program.weights[weight])
        assert isinstance(program.weights.entry(weight), Encoded)
    count = 640 * 512 + 512 * 192
    small = export_program(program, tmp_path / "small", "onnx")
    size = (small / "model.onnx.data").stat().st_size + (small / "model.onnx").stat().st_size
    assert size - 12000 <= bits * count / 8
