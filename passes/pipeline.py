"""The pipeline: refuse wrong orders, run passes, verify each, roll back what broke its bound."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..ir.errors import FactBroken, PassBroke, WrongOption, WrongOrder
from ..ir.facts import refute
from ..ir.history import Measured, PassRecord
from ..ir.numerics import sqnr
from ..ir.program import Program
from ..ir.rewrite import Journal
from ..ir.text import excerpt
from ..ir.verify import Deviation, Yardstick, check_structure
from .contract import Context, Fidelity, Pass

LEVELS = ("structure", "facts", "numbers")


@dataclass(frozen=True)
class Verdict:
    """What verification found after one pass."""

    measured: list[Measured] = field(default_factory=list[Measured])
    broken: Deviation | None = None
    weight: str = ""
    """The weight that broke a LOSSY budget."""


@dataclass
class Pipeline:
    """An ordered list of passes.

    verify: "structure" (always done), "facts" (and what passes ensure), "numbers" (and what their
    contracts promise, on the probes). on_break: "rollback" leaves out single rewrites that break
    their bound, "raise" stops with PassBroke.
    """

    passes: Sequence[Pass]
    verify: str = "facts"
    on_break: str = "rollback"
    progress: Callable[[int, int, str], None] = lambda done, total, what: None

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
            program = self._step(step, program, probes, list(calibration))
        self.progress(len(self.passes), len(self.passes), "done")
        return program

    def _step(
        self, step: Pass, before: Program, probes: Sequence[Any], calibration: list[list[Any]]
    ) -> Program:
        started = time.perf_counter()
        after, journal = run_pass(step, before, calibration)
        verdict = Verdict()
        dropped: list[int] = []
        if self.verify == "numbers":
            yardstick = Yardstick(before, probes, step.contract.fidelity is Fidelity.EXACT)
            verdict = verify_numbers(step, before, after, journal, yardstick)
            while verdict.broken is not None or verdict.weight:
                if self.on_break == "raise":
                    raise broken_error(step, after, verdict, journal)
                number = find_culprit(step, before, yardstick, journal, verdict, set(dropped))
                if number is None or len(dropped) >= 64:
                    raise broken_error(step, after, verdict, journal)
                dropped.append(number)
                after, journal = run_pass(step, before, calibration, skip=dropped)
                verdict = verify_numbers(step, before, after, journal, yardstick)
        record = self._record(step, before, after, journal, verdict, started)
        if dropped:
            _, full = run_pass(step, before, calibration)
            left_out = [a for a in full.applied_records(before) if a.number in dropped]
            record.rolled_back = left_out
        after.history.records.append(record)
        return after

    def _record(
        self,
        step: Pass,
        before: Program,
        after: Program,
        journal: Journal,
        verdict: Verdict,
        started: float,
    ) -> PassRecord:
        self._settle_facts(step, after)
        return PassRecord(
            name=step.pass_name(),
            options=step.options(),
            fidelity=step.contract.fidelity.value,
            seconds=time.perf_counter() - started,
            nodes=(len(before.graph.nodes), len(after.graph.nodes)),
            nbytes=(before.nbytes(), after.nbytes()),
            applied=journal.applied_records(after),
            declined=journal.declined_records(),
            measured=verdict.measured,
        )

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


def run_pass(
    step: Pass,
    program: Program,
    calibration: list[list[Any]] | None = None,
    limit: int | None = None,
    skip: Sequence[int] = (),
) -> tuple[Program, Journal]:
    """Run one pass on a copy and check its structure; limit, skip: see `Journal`."""
    after = program.copy()
    journal = Journal(after, limit, skip)
    step.run(after, Context(journal, calibration or []))
    check_structure(after, program, step.pass_name())
    return after, journal


def verify_numbers(
    step: Pass, before: Program, after: Program, journal: Journal, yardstick: Yardstick
) -> Verdict:
    """Hold a pass to its contract on the yardstick's probes."""
    if step.contract.fidelity is Fidelity.LOSSY:
        return _verify_budget(step, before, after, journal)
    found = yardstick.compare(after, journal.final_pairs(), step.contract.growth)
    if not found:
        return Verdict()
    worst = max(found, key=lambda d: d.outgoing - d.limit)
    measure = "bit difference" if yardstick.exact else "relative error against float64"
    measured = [Measured(measure, worst.incoming, worst.outgoing, worst.limit, worst.after)]
    if not yardstick.exact:
        wide = max(found, key=lambda d: d.wide)
        measured.append(Measured("difference of float64 runs", 0.0, wide.wide, 1e-7, wide.after))
    return Verdict(measured, next((d for d in found if d.broken), None))


def _verify_budget(step: Pass, before: Program, after: Program, journal: Journal) -> Verdict:
    """Each changed weight against its SQNR budget; outputs are allowed to change."""
    least, where = float("inf"), ""
    for _, name in journal.changed_weights:
        ratio = sqnr(before.weights[name], after.weights[name])
        if ratio < least:
            least, where = ratio, name
    if not where:
        return Verdict()
    budget = step.contract.min_sqnr
    measured = [Measured("least weight SQNR (dB)", float("inf"), least, budget, where)]
    return Verdict(measured, weight=where if least < budget else "")


def find_culprit(
    step: Pass,
    before: Program,
    yardstick: Yardstick,
    journal: Journal,
    verdict: Verdict,
    skipped: set[int],
) -> int | None:
    """The number of the single rewrite that breaks the contract, by bisection over numbers.

    None if the pass is broken without any rewrite.
    """
    if verdict.weight:
        return next(n for n, name in journal.changed_weights if name == verdict.weight)

    def broken(limit: int) -> bool:
        after, partial = run_pass(step, before, limit=limit, skip=sorted(skipped))
        return verify_numbers(step, before, after, partial, yardstick).broken is not None

    if broken(0):
        return None
    good, bad = 0, journal.count
    guess = verdict.broken.number if verdict.broken else 0
    if guess and broken(guess):  # usually the first value that is off names the culprit
        bad = guess
        if not broken(guess - 1):
            return guess
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if broken(middle) else (middle, bad)
    return bad


def broken_error(step: Pass, after: Program, verdict: Verdict, journal: Journal) -> PassBroke:
    """The error that names what a pass broke, and where."""
    if verdict.weight:
        m = verdict.measured[0]
        return PassBroke(
            f"{step.pass_name()} breaks its budget at the weight {verdict.weight}",
            where=verdict.weight,
            expected=f"at least {m.allowed:.1f} dB",
            found=f"{m.after:.1f} dB",
            fix="use more bits or smaller groups for this layer, or exclude it",
        )
    deviation = verdict.broken
    assert deviation is not None
    node = next(n for n in after.graph.nodes if n.name == deviation.after)
    by = next((a for a in journal.applied_records(after) if a.number == deviation.number), None)
    rewrite = f"rewrite {by.number} ({by.rule})" if by else "a value that no rewrite names"
    return PassBroke(
        f"{step.pass_name()} changed what the program computes, at {rewrite}:\n{excerpt(node)}",
        where=deviation.module or "the root module",
        expected=f"relative error at most {deviation.limit:.2g} (before: {deviation.incoming:.2g})"
        + (", float64 runs equal to 1e-7" if deviation.limit != 0 else ", the same bits"),
        found=f"{deviation.outgoing:.2g}, float64 runs differ by {deviation.wide:.2g}",
        fix="run with on_break=rollback to go on without it, or correct the rule",
    )


__all__ = ["LEVELS", "Pipeline", "find_culprit", "run_pass", "verify_numbers"]
