"""Integer weights stay packed in ONNX and compute what their format says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx_checks import (
    assert_equal_to_rounding,
    domains,
    exported,
    graph_of,
    op_counts,
    run_exported,
)
from planish.codegen.run_onnx import OnnxModel
from planish.codegen.target import export_program
from planish.ir.capture import capture_module
from planish.ir.errors import WrongOption
from planish.ir.formats import AffineInt
from planish.ir.interpret import run
from planish.ir.numerics import relative_error
from planish.ir.program import Program
from torch import Tensor, nn

IDS = torch.randint(0, 101, (3, 5), generator=torch.Generator().manual_seed(4))


class _Small(nn.Module):
    """A table, a linear with a bias, a product with an untransposed matrix, and an output."""

    def __init__(self, tie: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(101, 72)
        self.up = nn.Linear(72, 40)
        self.mix = nn.Parameter(torch.randn(40, 72) / 6)
        self.head = nn.Linear(72, 101, bias=False)
        if tie:
            self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.relu(self.up(self.table(ids)))
        mixed = torch.addmm(hidden.new_zeros(72), hidden.flatten(0, 1), self.mix)
        return self.head(mixed.unflatten(0, ids.shape))


def _captured(tie: bool) -> Program:
    return capture_module(_Small(tie), (torch.zeros(2, 7, dtype=torch.int64),))


@pytest.fixture(scope="module")
def plain() -> Program:
    return _captured(tie=False)


@pytest.fixture(scope="module")
def tied() -> Program:
    return _captured(tie=True)


def packed(program: Program, fmt: AffineInt) -> Program:
    """All matrices in a format, each grouped along the axis that is summed over."""
    program = program.copy()
    for name, weight in list(program.weights.items()):
        if weight.dim() == 2:
            program.weights[name] = fmt.encode(weight, -2 if name == "mix" else -1)
    return program


FORMATS = [
    AffineInt(bits, group, symmetric)
    for bits in (2, 3, 4, 5, 8)
    for group in (None, 24, 32)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_a_packed_model_equals_its_program(
    plain: Program, fmt: AffineInt, profile: str, tmp_path: Path
) -> None:
    program = packed(plain, fmt)
    folder = exported(program, tmp_path / "out", profile=profile)
    assert profile == "ort" or domains(folder) == {""}
    assert_equal_to_rounding(program, folder, [IDS])


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_tied_table_equals_its_program(
    tied: Program, bits: int, symmetric: bool, profile: str, tmp_path: Path
) -> None:
    program = packed(tied, AffineInt(bits, 32, symmetric))
    folder = exported(program, tmp_path / "out", profile=profile)
    assert_equal_to_rounding(program, folder, [IDS])


@pytest.mark.parametrize(("bits", "profile"), [(4, "ort"), (8, "ort"), (8, "standard")])
def test_a_tied_table_is_stored_once(
    tied: Program, bits: int, profile: str, tmp_path: Path
) -> None:
    folder = exported(packed(tied, AffineInt(bits, 32)), tmp_path / "out", profile=profile)
    tables = [t.name for t in graph_of(folder).initializer if t.name.startswith("table.weight")]
    assert len(tables) == 2  # codes and scales


def test_the_kernels_of_profile_ort(plain: Program, tmp_path: Path) -> None:
    counts = op_counts(exported(packed(plain, AffineInt(4, 32)), tmp_path / "out"))
    assert (counts["MatMulNBits"], counts["GatherBlockQuantized"], counts["MatMul"]) == (3, 1, 0)
    counts = op_counts(exported(packed(plain, AffineInt(8, 32)), tmp_path / "out"))
    assert (counts["MatMulNBits"], counts["DequantizeLinear"], counts["MatMul"]) == (0, 3, 3)


def test_profile_standard_dequantizes_by_blocks(plain: Program, tmp_path: Path) -> None:
    program = packed(plain, AffineInt(4, 24))
    folder = exported(program, tmp_path / "out", profile="standard")
    nodes = [n for n in graph_of(folder).node if n.op_type == "DequantizeLinear"]
    blocks = [next(a.i for a in n.attribute if a.name == "block_size") for n in nodes]
    assert blocks == [24, 24, 24]


def test_onnxruntime_by_itself_keeps_activations_in_float(plain: Program, tmp_path: Path) -> None:
    """Without session options: it must not fuse the pair into a product of 8 bit activations."""
    program = packed(plain, AffineInt(4, 32))
    folder = exported(program, tmp_path / "out", profile="standard")
    session = ort.InferenceSession(folder / "model.onnx")
    (found,) = session.run(None, {"ids": IDS.numpy()})
    true, narrow = run(program, [IDS], float64=True)[0], run(program, [IDS])[0]
    assert relative_error(true, torch.from_numpy(found)) <= 2 * relative_error(true, narrow)


@pytest.mark.parametrize("bits", [4, 8])
def test_activations_in_8_bits_only_when_asked(plain: Program, bits: int, tmp_path: Path) -> None:
    program = packed(plain, AffineInt(bits, 32))
    folder = exported(program, tmp_path / "out", options={"activations": "int8"})
    nodes = [n for n in graph_of(folder).node if n.op_type == "MatMulNBits"]
    levels = {next(a.i for a in n.attribute if a.name == "accuracy_level") for n in nodes}
    assert (len(nodes), levels) == (3, {4})
    assert OnnxModel(folder).metadata["planish.activations"] == "int8"
    # Three products in a row, each of activations cut to steps of 1/127 of a block's largest.
    error = relative_error(run(program, [IDS])[0], run_exported(program, folder, [IDS])[0])
    assert 1e-5 < error < 3 / 127


def test_profile_standard_has_no_8_bit_activations(plain: Program, tmp_path: Path) -> None:
    with pytest.raises(WrongOption, match="only profile ort"):
        export_program(
            plain,
            tmp_path / "out",
            "onnx",
            profile="standard",
            options={"activations": "int8"},
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("profile", ["ort", "standard"])
@pytest.mark.parametrize(("bits", "share"), [(2, 0.10), (4, 0.16), (8, 0.29)])
def test_the_file_is_as_small_as_the_format(
    bits: int, share: float, profile: str, tmp_path: Path
) -> None:
    """Groups of 64 with float32 scales: bits + 0.5 of 32; standard ONNX 23 has no 2 bit codes."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(320, 512, bias=False), nn.Linear(512, 192, bias=False))
    program = capture_module(model, (torch.randn(3, 320),))
    whole = export_program(program, tmp_path / "float32", "onnx") / "model.onnx.data"
    program = packed(program, AffineInt(bits, 64))
    small = export_program(program, tmp_path / "small", "onnx", profile=profile)
    size = (small / "model.onnx.data").stat().st_size
    wanted = share if (bits, profile) != (2, "standard") else 0.16
    assert size <= wanted * whole.stat().st_size


def test_scales_in_half_precision_stay_so_in_the_file(plain: Program, tmp_path: Path) -> None:
    program = packed(plain, AffineInt(4, 32, scale_dtype=torch.float16))
    folder = exported(program, tmp_path / "out")
    scales = [t for t in graph_of(folder).initializer if t.name.endswith(".scale")]
    assert {t.data_type for t in scales} == {10}  # FLOAT16
    assert_equal_to_rounding(program, folder, [IDS])


class _Experts(nn.Module):
    """Weights of three axes, indexed whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(4, 12, 20))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return torch.bmm(self.experts[chosen], x.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_three_axes_stay_integers(axis: int, symmetric: bool, tmp_path: Path) -> None:
    inputs = (torch.randn(3, 20), torch.tensor([2, 0, 3]))
    program = capture_module(_Experts(), inputs)
    program.weights["experts"] = AffineInt(4, 8, symmetric).encode(program.weights["experts"], axis)
    folder = exported(program, tmp_path / "out")
    codes = next(t for t in graph_of(folder).initializer if t.name == "experts.integers")
    assert list(codes.dims) == [4, 12, 20]
    assert_equal_to_rounding(program, folder, list(inputs))


def test_packed_files_are_the_same_every_time(plain: Program, tmp_path: Path) -> None:
    program = packed(plain, AffineInt(4, 32))
    first, second = (
        export_program(program, tmp_path / name, "onnx") / "model.onnx.data" for name in "ab"
    )
    assert np.array_equal(np.fromfile(first, np.uint8), np.fromfile(second, np.uint8))
