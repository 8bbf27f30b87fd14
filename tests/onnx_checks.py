"""Export a program, run it in onnxruntime, and measure both float32 runs against float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from planish.codegen.run_onnx import OnnxModel
from planish.codegen.target import export_program
from planish.ir.interpret import run
from planish.ir.numerics import relative_error
from planish.ir.program import Program
from torch import Tensor

MARGIN = 2.0
"""onnxruntime rounds as often as PyTorch does, in another order: two sums of the same random
rounding errors, whose sizes over a whole tensor agree closely; twice is a systematic difference."""


def exported(program: Program, folder: Path, **options: Any) -> Path:
    """The folder of a checked model; options are those of export_program."""
    out = export_program(program, folder, "onnx", force=True, **options)
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    return out


def graph_of(folder: Path) -> onnx.GraphProto:
    return onnx.load(folder / "model.onnx", load_external_data=False).graph


def op_counts(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in graph_of(folder).node)


def domains(folder: Path) -> set[str]:
    return {node.domain for node in graph_of(folder).node}


def run_exported(program: Program, folder: Path, flat: Sequence[Any]) -> list[Tensor]:
    """The exported model's outputs on the program's flat inputs."""
    tensors = zip(program.input_specs, flat, strict=True)
    given = {spec.name: value for spec, value in tensors if spec.is_tensor}
    return list(OnnxModel(folder, threads=1)(**given).values())


def assert_equal_to_rounding(program: Program, folder: Path, flat: Sequence[Any]) -> None:
    """Every output is as near to a float64 run as PyTorch's own float32 run is.

    An output of few elements may meet exact cancellation in one of the two, so that one rounding
    of the largest value is always allowed.
    """
    found = run_exported(program, folder, flat)
    narrow = [value for value in run(program, flat) if isinstance(value, Tensor)]
    exact = [value for value in run(program, flat, float64=True) if isinstance(value, Tensor)]
    assert len(found) == len(narrow)
    for ours, theirs, true in zip(found, narrow, exact, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        if not theirs.is_floating_point():
            assert torch.equal(ours, theirs)
            continue
        eps = torch.finfo(theirs.dtype).eps
        allowed = MARGIN * relative_error(true, theirs) + eps
        assert relative_error(true, ours) <= allowed
