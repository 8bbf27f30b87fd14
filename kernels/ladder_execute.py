"""Rung 4: the code that the compiler made of each case, executed on the CPU.

Catches miscompiled tiles, wrong layouts, missing barriers and waits, and rounding that the
interpreter does not have. Compiled for an architecture that is not there; ptxas is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .aot import Compiled, compile_launch
from .ladder_judge import Judgement
from .ladder_problem import (
    Ask,
    Found,
    arguments_of,
    cases_for,
    judged,
    left_out,
    plan_of,
    tried,
)
from .ladder_result import Outcome
from .launch import Launch
from .ptx_errors import UnsupportedInstruction
from .ptx_execute import Execution, execute
from .traffic import grown, key_of
from .triton_spec import Case, TritonSpec

RUNG = 4

Change = Callable[[int, str], str]
"""(place of a launch in the plan, its PTX) to the PTX to execute instead."""


@dataclass(frozen=True)
class Ran:
    """A case that was executed: its judgement, and what the executions of its launches counted."""

    judgement: Judgement
    executions: tuple[Execution, ...]

    @property
    def verdict(self) -> Judgement:
        """The results are right and no two threads raced for a place in shared memory."""
        raced = [one for one in self.executions if one.races]
        if raced:
            races = self.counts["races"]
            return Judgement(False, f"{races} races, the first: {raced[0].race_sites[0]}")
        return self.judgement

    @property
    def counts(self) -> dict[str, int]:
        """By name, over the launches."""
        return {text: sum(getattr(one, name) for one in self.executions) for name, text in _COUNTED}


_COUNTED = (
    ("instructions", "instructions"),
    ("races", "races"),
    ("shared_wavefronts", "shared wavefronts"),
    ("shared_ideal", "shared wavefronts at best"),
    ("global_load_sectors", "sectors read"),
    ("global_store_sectors", "sectors written"),
    ("matrix_instructions", "matrix instructions"),
)


def climb(spec: TritonSpec, ask: Ask) -> Iterator[Outcome]:
    """One outcome for each case and each of its architectures."""
    for case, skipped in cases_for(spec, RUNG, "ptx", ask):
        if skipped:
            yield skipped
            continue
        for arch in (arch for arch in case.archs if arch in ask.archs):
            yield _climb_one(spec, case, arch)


def _climb_one(spec: TritonSpec, case: Case, arch: str) -> Outcome:
    refused = spec.why_not(arch, **arguments_of(case))
    if refused:
        return left_out(spec, RUNG, case.name, refused, arch)
    unknown: list[str] = []

    def attempt() -> Found:
        try:
            ran = run_case(spec, case, arch)
        except UnsupportedInstruction as error:
            unknown.append(error.what)
            return Judgement(False, error.what), {}
        more = grown(key_of(spec, case.name, arch), ran.counts)
        if more and ran.verdict.right:
            return Judgement(False, more), ran.counts
        return ran.verdict, ran.counts

    outcome = tried(spec, RUNG, case.name, arch, attempt)
    return left_out(spec, RUNG, case.name, unknown[0], arch) if unknown else outcome


def run_case(
    spec: TritonSpec,
    case: Case,
    arch: str,
    change: Change | None = None,
    known: dict[int, Compiled] | None = None,
    **limits: Any,
) -> Ran:
    """Compile the launches of a case, execute them in order and judge the results.

    change: what to execute instead of a launch's PTX. known: what was compiled before, by place;
    it is added to. limits: for `execute`. Raises what compile_launch and execute raise.
    """
    arguments = arguments_of(case)
    plan = plan_of(spec, case, arguments, arch)
    known = {} if known is None else known
    executions: list[Execution] = []
    for place, launch in enumerate(plan.launches):
        if 0 in launch.grid:
            continue
        if place not in known:
            known[place] = compile_launch(launch, arch)
        compiled = known[place]
        ptx = change(place, compiled.ptx) if change else compiled.ptx
        executions.append(_execute(launch, compiled, ptx, limits))
    return Ran(judged(spec, case, arguments, plan), tuple(executions))


def _execute(launch: Launch, compiled: Compiled, ptx: str, limits: Mapping[str, Any]) -> Execution:
    values = [launch.args[name] for name in compiled.parameters]
    return execute(
        ptx, launch.grid, values, threads=compiled.threads, shared=compiled.shared, **limits
    )
