"""The pipeline: refuse wrong orders, run passes, verify each, roll back what broke its bound."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ir.errors import FactBroken, WrongOption, WrongOrder
from ..ir.facts import refute
from ..ir.history import Applied, Declined, PassRecord
from ..ir.program import Program
from .bisect import accuse, find_culprit, find_rewrite
from .contract import Pass
from .judge import Attempt, Judge, Progress, Verdict, quiet, run_pass, verify_numbers

LEVELS = ("structure", "facts", "numbers")
_MOST_DROPPED = 64


@dataclass
class Pipeline:
    """An ordered list of passes.

    verify: "structure" (always done), "facts" (and what passes ensure), "numbers" (and what their
    contracts promise, on the probes). on_break: "rollback" leaves out single rewrites that break
    their bound, "raise" stops with PassBroke. reproducer: a folder to write, from which
    `planish explain` replays the fault, before PassBroke is raised. progress: called with
    (done, total, what).
    """

    passes: Sequence[Pass]
    verify: str = "facts"
    on_break: str = "rollback"
    progress: Progress = quiet
    reproducer: str | Path | None = None

    def __post_init__(self) -> None:
        for name, value, known in (
            ("verify", self.verify, LEVELS),
            ("on_break", self.on_break, ("rollback", "raise")),
        ):
            if value not in known:
                raise WrongOption(
                    f"{name} cannot be {value!r}", expected=" or ".join(known), found=repr(value)
                )

    def check_order(self, facts: frozenset[str], calibrated: bool = True) -> None:
        """Raise WrongOrder if a pass will not find the facts that it requires."""
        first = facts
        for place, step in enumerate(self.passes):
            missing = step.contract.requires - facts
            if missing:
                raise self._wrong_order(place, sorted(missing)[0], first)
            if "calibration" in step.contract.needs and not calibrated:
                raise WrongOrder(
                    f"{step.pass_name()} needs calibration batches",
                    fix="pass calibration=[(ids,), ...] with a few representative inputs",
                )
            facts = (facts | step.contract.ensures) - step.contract.breaks

    def _wrong_order(self, place: int, fact: str, facts: frozenset[str]) -> WrongOrder:
        step = self.passes[place]
        broke = [p.pass_name() for p in self.passes[:place] if fact in p.contract.breaks]
        later = [p.pass_name() for p in self.passes[place + 1 :] if fact in p.contract.ensures]
        if broke:
            fix = f"run {step.pass_name()} before {broke[-1]}, which breaks {fact!r}"
        elif later:
            fix = f"run {later[0]}, which ensures {fact!r}, before {step.pass_name()}"
        else:
            fix = f"no pass of this recipe ensures {fact!r}: add one that does"
        return WrongOrder(
            f"{step.pass_name()} requires {fact!r}, which will not hold at its place",
            where=f"step {place + 1} of {len(self.passes)}",
            expected=f"{fact} to hold",
            found=f"facts at the start: {', '.join(sorted(facts)) or 'none'}",
            fix=fix,
        )

    def run(
        self,
        program: Program,
        probes: Sequence[Sequence[Any]] = (),
        calibration: Sequence[list[Any]] = (),
    ) -> Program:
        """Run all passes on a copy. probes, calibration: flat input lists.

        Raises WrongOrder before anything runs, PassBroke and FactBroken where a pass failed.
        """
        self.check_order(program.facts, bool(calibration))
        probes = list(probes) or ([list(program.examples)] if program.examples else [])
        if self.verify == "numbers" and not probes:
            raise WrongOption(
                "verify=numbers needs example inputs",
                fix="pass probes, or trace the model with example inputs",
            )
        program = program.copy()
        for done, step in enumerate(self.passes):
            self.progress(done, len(self.passes), step.pass_name())
            place = (done + 1, len(self.passes))
            program = self._step(step, program, probes, list(calibration), place)
        self.progress(len(self.passes), len(self.passes), "done")
        return program

    def _step(
        self,
        step: Pass,
        before: Program,
        probes: Sequence[Any],
        calibration: list[list[Any]],
        place: tuple[int, int],
    ) -> Program:
        started = time.perf_counter()
        judge = Judge(step, before, probes, calibration, self.progress)
        dropped: list[_Dropped] = []
        if self.verify == "numbers":
            attempt = self._drop_wrong(judge, dropped, place)
        else:
            after, journal = run_pass(step, before, calibration, progress=self.progress)
            attempt = Attempt(after, journal, Verdict())
        after = attempt.after
        self._settle_facts(step, after)
        record = PassRecord(
            name=step.pass_name(),
            options=step.options(),
            fidelity=step.contract.fidelity.value,
            seconds=time.perf_counter() - started,
            nodes=(len(before.graph.nodes), len(after.graph.nodes)),
            nbytes=(before.nbytes(), after.nbytes()),
            applied=attempt.journal.applied_records(after),
            declined=_declined(step, attempt, dropped),
            measured=[*attempt.journal.measured, *attempt.verdict.measured],
            rolled_back=[record for d in dropped for record in d.applied],
        )
        after.history.records.append(record)
        return after

    def _drop_wrong(self, judge: Judge, dropped: list[_Dropped], place: tuple[int, int]) -> Attempt:
        """Leave out one wrong rewrite after another until the contract holds.

        Each one found is the first at which the pass goes wrong, so the numbers only grow and what
        is left out later does not renumber what was left out before.
        """
        attempt = judge.attempt()
        while attempt.verdict.wrong:
            skip = [d.number for d in dropped]
            number = find_rewrite(judge, attempt, skip)
            known = number is not None and number not in skip and len(skip) < _MOST_DROPPED
            if self.on_break == "raise" or not known:
                raise accuse(judge, attempt, number, skip, place, self.reproducer).error()
            assert number is not None
            dropped.append(_Dropped.of(number, attempt))
            attempt = judge.attempt(skip=[*skip, number])
        return attempt

    def _settle_facts(self, step: Pass, after: Program) -> None:
        after.facts = (after.facts | step.contract.ensures) - step.contract.breaks
        if self.verify == "structure":
            return
        reason = refute(after, step.contract.ensures)
        if reason:
            raise FactBroken(
                f"{step.pass_name()} ensures a fact that does not hold",
                where=f"pass {step.spelling()}",
                expected=", ".join(sorted(step.contract.ensures)),
                found=reason,
                fix="correct the pass, or its contract",
            )


@dataclass(frozen=True)
class _Dropped:
    """A rewrite that was rolled back, as the run in which it was found wrong had applied it."""

    number: int
    applied: list[Applied] = field(default_factory=list[Applied])
    sentence: str = ""

    @classmethod
    def of(cls, number: int, attempt: Attempt) -> _Dropped:
        records = attempt.journal.applied_records(attempt.after)
        applied = [record for record in records if record.number == number]
        return cls(number, applied, f"rolled back: {attempt.verdict.sentence()}")

    def declined(self) -> Declined:
        if not self.applied:
            return Declined("", f"rewrite {self.number}", "", self.sentence)
        first = self.applied[0]
        return Declined(first.rule, first.before, first.module, self.sentence)


def _declined(step: Pass, attempt: Attempt, dropped: list[_Dropped]) -> list[Declined]:
    """What the rules left alone, what was rolled back, and why numbers were not compared."""
    declined = [*attempt.journal.declined_records(), *(d.declined() for d in dropped)]
    if attempt.verdict.unverified:
        declined.append(Declined(step.pass_name(), "probes", "", attempt.verdict.unverified))
    return declined


__all__ = ["LEVELS", "Pipeline", "find_culprit", "run_pass", "verify_numbers"]
