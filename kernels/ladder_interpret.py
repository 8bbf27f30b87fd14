"""Rung 1: every case of a kernel in the repaired interpreter, against its float64 twin.

Catches wrong logic, masks, indices and addresses; needs a process with TRITON_INTERPRET=1.
"""

from __future__ import annotations

from collections.abc import Iterator

from .interpreter import repair
from .ladder_problem import Ask, Found, arguments_of, cases_for, judged, left_out, plan_of, tried
from .ladder_result import Outcome
from .triton_spec import Case, TritonSpec

RUNG = 1


def climb(spec: TritonSpec, ask: Ask) -> Iterator[Outcome]:
    """One outcome for each case. Raises InterpreterOff."""
    with repair(tf32=True):
        for case, skipped in cases_for(spec, RUNG, "interpret", ask):
            refused = spec.why_not(_arch_of(case), **arguments_of(case))
            if refused and not skipped:
                skipped = left_out(spec, RUNG, case.name, refused)
            yield skipped or tried(spec, RUNG, case.name, "", lambda case=case: _run(spec, case))


def _arch_of(case: Case) -> str:
    return case.archs[0] if case.archs else "sm_80"


def _run(spec: TritonSpec, case: Case) -> Found:
    arguments = arguments_of(case)
    plan = plan_of(spec, case, arguments, _arch_of(case))
    plan.run()
    return judged(spec, case, arguments, plan), {"launches": len(plan.launches)}
