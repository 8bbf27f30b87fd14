"""A case of a kernel made ready to run on the CPU, with nothing in its results before it ran."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import PlanishError
from .ladder_judge import Judgement, judge
from .ladder_result import Outcome
from .launch import Plan
from .triton_spec import ARCHS, Arguments, Case, TritonSpec


@dataclass(frozen=True)
class Ask:
    """What to climb: archs, and of the cases and forms those whose name has `case` in it."""

    archs: tuple[str, ...] = ARCHS
    case: str = ""

    def wants(self, name: str) -> bool:
        return self.case in name


Found = tuple[Judgement, dict[str, Any]]
"""A judgement, and figures by name."""


def arguments_of(case: Case) -> Arguments:
    """The same every time."""
    return case.make(torch.Generator().manual_seed(0))


def plan_of(spec: TritonSpec, case: Case, arguments: Arguments, arch: str) -> Plan:
    """The plan of a case; what it allocates without writing holds NaN or the largest integer.

    Otherwise the memory of an earlier run may hold the right result where the kernel wrote nothing.
    """
    with _empty_is_filled():
        return spec.plan(**arguments, config=case.config, arch=arch)


def judged(spec: TritonSpec, case: Case, arguments: Arguments, plan: Plan) -> Judgement:
    """Of a plan that ran: its results are right and its arguments are as they were."""
    fresh = arguments_of(case)
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not _same_bits(value, fresh[name]):
            return Judgement(False, f"the kernel wrote into its argument {name}")
    return judge(spec, case, fresh, plan.outputs)


def tried(
    spec: TritonSpec, rung: int, what: str, arch: str, attempt: Callable[[], Found]
) -> Outcome:
    """One attempt as an outcome, an error of any kind included: kernels may raise whatever."""
    started = perf_counter()
    try:
        judgement, figures = attempt()
    except Exception as error:
        judgement, figures = Judgement(False, _sentence(error)), {}
    status = "ok" if judgement.right else "failed"
    seconds = perf_counter() - started
    return Outcome(spec.name, rung, what, status, judgement.sentence, arch, seconds, figures)


def left_out(spec: TritonSpec, rung: int, what: str, why: str, arch: str = "") -> Outcome:
    return Outcome(spec.name, rung, what, "not run", why, arch)


def cases_for(
    spec: TritonSpec, rung: int, kind: str, ask: Ask
) -> Iterator[tuple[Case, Outcome | None]]:
    """The cases asked for; with an outcome if a case leaves this kind of rung out."""
    for case in spec.cases:
        if not ask.wants(case.name):
            continue
        skipped = kind not in case.rungs
        why = case.reason or "the case leaves this rung out"
        yield case, left_out(spec, rung, case.name, why) if skipped else None


def _sentence(error: Exception) -> str:
    """What went wrong, in one line, with what was found and where if the error knows it."""
    kind = type(error).__name__
    if not isinstance(error, PlanishError):
        return f"{kind}: {' '.join(str(error).split())[:400]}"
    found = next(iter(error.found.strip().splitlines()[-1:]), "")  # compilers quote the source
    where = " ".join(error.where.split())
    return f"{kind}: {error.what}" + (f": {found}" if found else "") + (f" ({where})" * bool(where))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    def bits(tensor: Tensor) -> Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return torch.equal(bits(one), bits(other))


@contextmanager
def _empty_is_filled() -> Generator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
