"""Rung 0 of the ladder, second half: the operation goes through planish's own capture and ONNX.

A kernel's twin is what every other target runs, so it should be a program that planish can capture,
write and run elsewhere. Where it cannot, the outcome names what stands in the way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .api import trace
from .ir.errors import MissingExtra, PlanishError
from .ir.program import Program
from .kernels.ladder_judge import Judgement, judge
from .kernels.ladder_operator import RUNG, Closed, samples
from .kernels.ladder_problem import Ask, Found, arguments_of, left_out, tried
from .kernels.ladder_result import Outcome
from .kernels.shape_only import written_out
from .kernels.triton_spec import Case, TritonSpec

_UNKNOWN_TO_ONNXRUNTIME = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Its CPU kernels, and numpy, do not have them."""


def climb(spec: TritonSpec, ask: Ask) -> Iterator[Outcome]:
    """The twin on one case through capture, the ONNX target and onnxruntime."""
    case = _sample(spec, ask)
    if case is None:
        yield left_out(spec, RUNG, "onnx", "no case has values of a type that onnxruntime has")
        return
    what = f"onnx of {case.name}"
    try:
        program = _captured(spec, case)
    except PlanishError as error:
        why = f"the twin is not captured: {str(error).splitlines()[0]}"
        yield left_out(spec, RUNG, what, why)
        return
    with tempfile.TemporaryDirectory() as folder:
        why = _written(program, Path(folder) / "twin")
        if why is None:
            path = Path(folder) / "twin"
            yield tried(spec, RUNG, what, "", lambda: _run(spec, case, path))
        else:
            yield left_out(spec, RUNG, what, why)


def _sample(spec: TritonSpec, ask: Ask) -> Case | None:
    """A case in float32 if there is one, else in float16."""
    fit = [case for case in samples(spec, ask, 100) if _has_onnx_types(case)]
    wide = [case for case in fit if torch.float32 in _dtypes(case)]
    return next(iter(wide or fit), None)


def _dtypes(case: Case) -> set[torch.dtype]:
    return {value.dtype for value in arguments_of(case).values() if isinstance(value, Tensor)}


def _has_onnx_types(case: Case) -> bool:
    return not _dtypes(case) & set(_UNKNOWN_TO_ONNXRUNTIME)


def _captured(spec: TritonSpec, case: Case) -> Program:
    arguments = arguments_of(case)
    module = Closed(spec.twin, arguments)
    inputs = module.inputs(arguments)
    still = tuple(None for _ in inputs)  # the sizes of the case, as the twin may look at them
    with written_out():
        return trace(module, inputs, dynamic_shapes=(still,))


def _written(program: Program, folder: Path) -> str | None:
    """None where the folder was written, else why not."""
    try:
        from .codegen.target import export_program

        export_program(program, folder, "onnx")
    except MissingExtra as error:
        return str(error).splitlines()[0]
    except PlanishError as error:
        return f"the twin is not written to ONNX: {str(error).splitlines()[0]}"
    return None


def _run(spec: TritonSpec, case: Case, folder: Path) -> Found:
    from .codegen.run_onnx import OnnxModel

    arguments = arguments_of(case)
    inputs = Closed(spec.twin, arguments).inputs(arguments)
    results = OnnxModel(folder, threads=1)(*inputs)
    judgement = judge(spec, case, arguments, tuple(results.values()))
    return Judgement(judgement.right, f"onnxruntime: {judgement.sentence}"), {}
