"""Every shipped Triton kernel: all cases interpreted, two small ones executed from compiled code.

Every case on every architecture, budgets and broken copies: test_kernels_full.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from planish.kernel_ladder import verify_kernels
from planish.kernels.catalog import triton_kernels
from planish.kernels.ladder_execute import climb
from planish.kernels.ladder_problem import Ask, arguments_of
from planish.kernels.ladder_result import RungResult
from planish.kernels.triton_spec import Case, TritonSpec
from shipped_kernels import NAMES
from torch import Tensor

SMALL = 2
ARCHS = ("sm_80", "sm_90")
"""The second for what the first has no instructions for."""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, RungResult]:
    """One process for all kernels: importing takes longer than most of them."""
    return {result.kernel: result for result in verify_kernels("all", [1])}


def test_the_catalog_is_what_is_tested(interpreted: dict[str, RungResult]) -> None:
    assert sorted(triton_kernels()) == NAMES == sorted(interpreted)
    assert len(NAMES) > 3


@pytest.mark.parametrize("name", NAMES)
def test_every_case_is_right_in_the_interpreter(
    name: str, interpreted: dict[str, RungResult]
) -> None:
    result = interpreted[name]
    wrong = [f"{one.what}: {one.sentence}" for one in result.outcomes if one.status == "failed"]
    assert not wrong, "\n".join(wrong)
    assert result.status == "ok"


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_has_cases_in_every_precision(name: str) -> None:
    """A mask or a cast that is wrong shows in one of them."""
    cases = triton_kernels()[name].cases
    dtypes = {dtype for case in cases for dtype in floats_of(case)}
    assert {torch.float16, torch.bfloat16, torch.float32} <= dtypes
    assert all(case.reason for case in cases if len(case.rungs) < 2), "a rung is left out silently"


@pytest.mark.parametrize("name", NAMES)
def test_small_cases_are_right_from_compiled_code(name: str) -> None:
    spec = triton_kernels()[name]
    arch, cases = smallest(spec)
    outcomes = list(climb(dataclasses.replace(spec, cases=cases), Ask((arch,))))
    wrong = [f"{one.what}: {one.sentence}" for one in outcomes if one.status != "ok"]
    assert not wrong, "\n".join(wrong)
    assert len(outcomes) == len(cases)


def floats_of(case: Case) -> set[torch.dtype]:
    values = arguments_of(case).values()
    return {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}


def smallest(spec: TritonSpec) -> tuple[str, tuple[Case, ...]]:
    """The cheapest case of 16-bit values and the cheapest other one, and what they run on."""
    arch, fit = next((arch, fit) for arch in ARCHS if (fit := executed(spec, arch)))
    cheap = sorted(fit, key=lambda case: spec.cost(**arguments_of(case)).flops or float("inf"))
    narrow = [case for case in cheap if floats_of(case) & {torch.float16, torch.bfloat16}]
    chosen = [*narrow[:1], *[case for case in cheap if case not in narrow][:1]]
    assert 0 < len(chosen) <= SMALL
    return arch, tuple(chosen)


def executed(spec: TritonSpec, arch: str) -> list[Case]:
    cases = [case for case in spec.cases if "ptx" in case.rungs and arch in case.archs]
    return [case for case in cases if spec.why_not(arch, **arguments_of(case)) is None]
