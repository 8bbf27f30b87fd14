"""Rung 5: compiled code with one mistake put in, which rung 4 must notice: is the oracle blind?

A broken copy is caught by an error, a race or a wrong result. One that is not may be equal to the
original, so a fifth may survive, but no kind of mistake as a whole. Single barriers do not count in
the fifth: with several buffers most are one of two that order the same accesses. One of them must
be caught, and the copy without any barrier.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from time import perf_counter

from ..ir.errors import PlanishError
from .aot import Compiled, KernelDoesNotCompile, compile_launch
from .ladder_execute import Ran, run_case
from .ladder_judge import Judgement
from .ladder_problem import Ask, arguments_of, cases_for, left_out, plan_of, tried
from .ladder_result import Outcome
from .ptx_errors import UnsupportedInstruction
from .ptx_mutants import Mutant, mutants
from .triton_spec import Case, TritonSpec

RUNG = 5

SURVIVORS = 0.2
"""The share of broken copies that may go unnoticed."""

_COMPILED = 8
"""Cases that are compiled, of which those with the most kinds of broken copies are executed."""

_EXECUTED = 3
"""Cases that are executed, of which the one that meets the most kinds of instructions is taken."""

_MATRIX = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)\b")
_BARRIER = "bar.sync dropped"
_LIMIT = 1_000_000
_PATIENCE = 4
"""A broken copy may execute that many times the instructions of the original."""


@dataclass(frozen=True)
class Program:
    """A case compiled for an architecture, and the broken copies of its launches by place.

    products: matrix instructions that the launches execute if each runs once in every block.
    """

    case: Case
    arch: str
    compiled: dict[int, Compiled]
    copies: tuple[tuple[int, Mutant], ...]
    size: int
    products: int

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(kind_of(copy) for _, copy in self.copies)


def climb(spec: TritonSpec, ask: Ask) -> Iterator[Outcome]:
    """The broken copies of one program for each architecture that is executed."""
    caught: dict[str, int] = defaultdict(int)
    missed: dict[str, int] = defaultdict(int)
    programs = _chosen(spec, ask)
    for program in programs:
        yield _climb_one(spec, program, caught, missed)
    if not programs:
        yield left_out(spec, RUNG, "broken copies", "no case is executed from its compiled code")
    blind = sorted(kind for kind in missed if not caught[kind])
    if blind:
        blind = _still_missed(spec, ask, programs, blind)
    if blind:
        verdict = Judgement(False, f"none was caught of: {', '.join(blind)}")
        yield tried(spec, RUNG, "kinds of mistakes", "", lambda: (verdict, {}))


def _still_missed(
    spec: TritonSpec, ask: Ask, tried_before: list[Program], blind: list[str]
) -> list[str]:
    """The kinds that no other case catches either: a mask may have nothing to hide in one case."""
    cases = [case for case, skipped in cases_for(spec, RUNG, "ptx", ask) if not skipped]
    known = {(program.case.name, program.arch) for program in tried_before}
    left = set(blind)
    for case in sorted(cases, key=lambda case: spec.cost(**arguments_of(case)).flops):
        for arch in (arch for arch in ask.archs if arch in case.archs):
            if not left or (case.name, arch) in known:
                continue
            program = _program(spec, case, arch)
            for place, copy in program.copies if program else ():
                kind = kind_of(copy)
                if program and kind in left and _how_caught(spec, program, place, copy, _LIMIT):
                    left.discard(kind)
    return sorted(left)


def kind_of(copy: Mutant) -> str:
    """The mistake of a broken copy without the place of it."""
    return re.sub(r" \d+( to \d+)?\b", "", copy.name)


def _chosen(spec: TritonSpec, ask: Ask) -> list[Program]:
    """For each architecture a case whose code can be broken in most ways and is mostly executed."""
    cases = [case for case, skipped in cases_for(spec, RUNG, "ptx", ask) if not skipped]
    chosen: list[Program] = []
    for arch in ask.archs:
        serving = _some(spec, [case for case in cases if arch in case.archs])
        programs = [found for case in serving if (found := _program(spec, case, arch))]
        programs.sort(key=lambda one: (-len(one.kinds), one.size))
        if programs:
            chosen.append(max(programs[:_EXECUTED], key=lambda one: _executed(spec, one)))
    return chosen


def _executed(spec: TritonSpec, program: Program) -> tuple[float, int]:
    """How often its matrix instructions run, up to twice, and how many different instructions do.

    A mistake in a branch that is not taken cannot be caught, and one in a loop may show only when
    what was read before is overwritten.
    """
    try:
        ran = run_case(spec, program.case, program.arch, known=program.compiled)
    except PlanishError:  # told where the whole program is executed
        return 0.0, 0
    trips = sum(one.matrix_instructions for one in ran.executions) / max(1, program.products)
    return min(trips, 2.0), len({op for one in ran.executions for op in one.opcodes})


def _some(spec: TritonSpec, cases: list[Case]) -> list[Case]:
    """A few of the cases, from the cheapest to the dearest: compiling them all takes too long."""
    by_cost = sorted(cases, key=lambda case: spec.cost(**arguments_of(case)).flops)
    step = (len(by_cost) - 1) / (_COMPILED - 1)
    places = range(len(by_cost)) if step <= 1 else (round(n * step) for n in range(_COMPILED))
    return [by_cost[place] for place in places]


def _program(spec: TritonSpec, case: Case, arch: str) -> Program | None:
    """None where there is nothing to break."""
    arguments = arguments_of(case)
    if spec.why_not(arch, **arguments):
        return None
    launches = plan_of(spec, case, arguments, arch).launches
    run = {place: launch for place, launch in enumerate(launches) if 0 not in launch.grid}
    try:
        compiled = {place: compile_launch(launch, arch) for place, launch in run.items()}
    except KernelDoesNotCompile:  # rung 4 tells
        return None
    copies = [(place, copy) for place, code in compiled.items() for copy in mutants(code.ptx)]
    size = sum(_blocks(run[place].grid) * len(code.ptx) for place, code in compiled.items())
    products = sum(
        _blocks(run[place].grid) * len(_MATRIX.findall(code.ptx))
        for place, code in compiled.items()
    )
    return Program(case, arch, compiled, tuple(copies), size, products) if copies else None


def _blocks(grid: tuple[int, ...]) -> int:
    blocks = 1
    for size in grid:
        blocks *= size
    return blocks


def _climb_one(
    spec: TritonSpec, program: Program, caught: dict[str, int], missed: dict[str, int]
) -> Outcome:
    started = perf_counter()
    case, arch = program.case, program.arch
    whole = tried(spec, RUNG, case.name, arch, lambda: _whole(spec, program))
    if whole.status != "ok":
        return whole
    survivors: list[str] = []
    limit = _PATIENCE * max(1000, whole.figures["instructions"])
    for place, copy in program.copies:
        how = _how_caught(spec, program, place, copy, limit)
        if how is None:
            survivors.append(copy.name)
        (missed if how is None else caught)[kind_of(copy)] += 1
    total = len(program.copies)
    sentence = f"{total - len(survivors)} of {total} broken copies caught"
    sentence += f"; not: {', '.join(survivors)}" if survivors else ""
    counted = [copy.name for _, copy in program.copies if kind_of(copy) != _BARRIER]
    unnoticed = sum(re.sub(r" \d.*", "", name) != "bar.sync" for name in survivors)
    status = "ok" if unnoticed <= SURVIVORS * len(counted) else "failed"
    figures = {"broken copies": total, "caught": total - len(survivors), "survivors": survivors}
    seconds = perf_counter() - started
    return Outcome(spec.name, RUNG, case.name, status, sentence, arch, seconds, figures)


def _whole(spec: TritonSpec, program: Program) -> tuple[Judgement, dict[str, int]]:
    ran = run_case(spec, program.case, program.arch, known=program.compiled)
    verdict = ran.verdict
    told = verdict.sentence if verdict.right else f"the unbroken code fails: {verdict.sentence}"
    return Judgement(verdict.right, told), ran.counts


def _how_caught(
    spec: TritonSpec, program: Program, place: int, copy: Mutant, limit: int
) -> str | None:
    """What gives a broken copy away, or None. One that cannot be executed is not caught."""

    def change(at: int, ptx: str) -> str:
        return copy.ptx if at == place else ptx

    try:
        ran: Ran = run_case(spec, program.case, program.arch, change, program.compiled, limit=limit)
    except UnsupportedInstruction:
        return None
    except PlanishError as error:  # anything else is a mistake of the simulator, not a catch
        return type(error).__name__
    return None if ran.verdict.right else ran.verdict.sentence
