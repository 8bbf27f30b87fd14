"""Run one pass and hold it to its contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..ir.errors import PassBroke
from ..ir.history import Measured
from ..ir.numerics import sqnr
from ..ir.program import Program
from ..ir.rewrite import Journal
from ..ir.verify import Deviation, Yardstick, check_structure, unchanged_nodes
from .contract import Context, Fidelity, Pass

Progress = Callable[[int, int, str], None]


def quiet(done: int, total: int, what: str) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class LostWeight:
    """A weight whose approximation is below its budget; both in dB."""

    number: int
    name: str
    sqnr: float
    budget: float


@dataclass(frozen=True)
class Verdict:
    """What verification found after one pass: what it measured, and the first thing wrong."""

    measured: list[Measured] = field(default_factory=list[Measured])
    broken: Deviation | None = None
    lost: LostWeight | None = None
    malformed: PassBroke | None = None
    unverified: str = ""
    """Why numbers were asked for and not compared, or ""."""

    @property
    def wrong(self) -> bool:
        return self.broken is not None or self.lost is not None or self.malformed is not None

    @property
    def weight(self) -> str:
        """The weight that broke a LOSSY budget, or ""."""
        return self.lost.name if self.lost else ""

    def sentence(self) -> str:
        """What is wrong, in half a sentence."""
        if self.malformed is not None:
            return self.malformed.what.splitlines()[0]
        if self.lost is not None:
            return f"{self.lost.sqnr:.1f} dB, budget {self.lost.budget:.1f} dB"
        d = self.broken
        if d is None:
            return "nothing is wrong"
        if d.nans:
            return f"{d.nans} NaNs that were not there"
        if d.limit == 0:
            return f"not the same bits (relative difference {d.outgoing:.2g})"
        if d.wide > d.wide_limit:
            return f"float64 runs differ by {d.wide:.2g}, allowed {d.wide_limit:.2g}"
        return f"error {d.outgoing:.2g} against float64, allowed {d.limit:.2g}"


@dataclass(frozen=True)
class Attempt:
    """One run of a pass, with some rewrites left out, and the verdict on it."""

    after: Program
    journal: Journal
    verdict: Verdict


def run_pass(
    step: Pass,
    program: Program,
    calibration: list[list[Any]] | None = None,
    limit: int | None = None,
    skip: Iterable[int] = (),
    progress: Progress = quiet,
) -> tuple[Program, Journal]:
    """Run one pass on a copy and check its structure; limit, skip: see `Journal`."""
    after, journal = _edited(step, program, calibration, limit, skip, progress)
    check_structure(after, program, step.pass_name(), not step.contract.changes_interface)
    return after, journal


def _edited(
    step: Pass,
    program: Program,
    calibration: list[list[Any]] | None,
    limit: int | None,
    skip: Iterable[int],
    progress: Progress,
) -> tuple[Program, Journal]:
    after = program.copy()
    journal = Journal(after, limit, skip)
    step.run(after, Context(journal, calibration or [], progress))
    return after, journal


class Judge:
    """One pass on one incoming program, tried with different rewrites left out.

    The incoming program is measured once; each attempt runs only the outgoing one.
    """

    def __init__(
        self,
        step: Pass,
        before: Program,
        probes: Sequence[Sequence[Any]],
        calibration: list[list[Any]] | None = None,
        progress: Progress = quiet,
    ) -> None:
        self.step, self.before, self.calibration = step, before, calibration
        self.progress = progress
        self.yardstick = Yardstick(before, probes, step.contract.fidelity is Fidelity.EXACT)
        self._last_wrong: tuple[tuple[int | None, tuple[int, ...]], Attempt] | None = None

    def attempt(
        self, limit: int | None = None, skip: Iterable[int] = (), numbers: bool = True
    ) -> Attempt:
        """Run the pass and judge what it left; a malformed program is a verdict, not an error."""
        key = (limit, tuple(skip))
        if self._last_wrong is not None and self._last_wrong[0] == key:
            return self._last_wrong[1]
        after, journal = _edited(
            self.step, self.before, self.calibration, limit, key[1], self.progress
        )
        try:
            own = self.step.contract.changes_interface
            check_structure(after, self.before, self.step.pass_name(), not own)
            verdict = Verdict()
            if numbers and not self._probes_fit():
                verdict = Verdict(unverified="numbers not verified: other inputs than the probes")
            elif numbers and not own and not _same_program(self.before, after):
                verdict = verify_numbers(self.step, self.before, after, journal, self.yardstick)
        except PassBroke as error:
            verdict = Verdict(malformed=error)
        attempt = Attempt(after, journal, verdict)
        if verdict.wrong:
            self._last_wrong = key, attempt
        return attempt

    def _probes_fit(self) -> bool:
        """Not so after a pass that gave the program other inputs."""
        wanted = len(self.before.inputs)
        return all(len(probe) == wanted for probe in self.yardstick.probes)


def _same_program(before: Program, after: Program) -> bool:
    """Whether nothing changed at all, so that nothing needs to be run."""
    nodes = len(before.graph.nodes)
    if len(after.graph.nodes) != nodes or len(unchanged_nodes(after, before)) != nodes:
        return False
    used = {str(node.target) for node in after.weight_nodes()}
    return all(before.weights.entry(name) is after.weights.entry(name) for name in used)


def verify_numbers(
    step: Pass, before: Program, after: Program, journal: Journal, yardstick: Yardstick
) -> Verdict:
    """Hold a pass to its contract on the yardstick's probes.

    EXACT and BOUNDED: at every touched value and at the outputs. LOSSY: each changed weight
    against its SQNR budget, no NaN that was not there, and, where the pass touched no value, the
    program with its old weights put back against the incoming one. Raises PassBroke if the
    outgoing program does not run.
    """
    if step.contract.fidelity is Fidelity.LOSSY:
        return _verify_budget(step, before, after, journal, yardstick)
    rounded, pairs = step.contract.rounds_weights, journal.final_pairs()
    found = yardstick.compare(after, pairs, step.contract.growth, rounds_weights=rounded)
    return Verdict(_measured(found, yardstick.exact), next((d for d in found if d.broken), None))


def _measured(found: Sequence[Deviation], exact: bool) -> list[Measured]:
    if not found:
        return []
    worst = max(found, key=lambda d: d.outgoing / d.limit if d.limit else d.outgoing)
    measure = "bit difference" if exact else "relative error against float64"
    measured = [Measured(measure, worst.incoming, worst.outgoing, worst.limit, worst.after)]
    if not exact:
        wide = max(found, key=lambda d: d.wide)
        name = "difference of float64 runs"
        measured.append(Measured(name, 0.0, wide.wide, wide.wide_limit, wide.after))
    return measured


def _verify_budget(
    step: Pass, before: Program, after: Program, journal: Journal, yardstick: Yardstick
) -> Verdict:
    numbers = {name: number for number, name in reversed(journal.changed_weights)}
    changed = [name for name in before.weights if _replaced(before, after, name)]
    ratios = {name: _sqnr(before.weights[name], after.weights[name]) for name in changed}
    budget, measured = step.contract.min_sqnr, list[Measured]()
    if ratios:
        least = min(ratios, key=lambda name: ratios[name])
        what = "least weight SQNR (dB)"
        measured.append(Measured(what, math.inf, ratios[least], budget, least))
    lost = [LostWeight(numbers.get(n, 0), n, r, budget) for n, r in ratios.items() if r < budget]
    if lost:
        return Verdict(measured, lost=min(lost, key=lambda w: w.number))
    outputs = yardstick.compare(after, [], math.inf, drift=False)
    broken = next((d for d in outputs if d.broken), None) or _restored(
        step, before, after, journal, yardstick, changed
    )
    worst = max((d.outgoing for d in outputs), default=0.0)
    measured.append(Measured("relative change of the outputs", 0.0, worst, math.inf))
    return Verdict(measured, broken)


def _replaced(before: Program, after: Program, name: str) -> bool:
    if name not in after.weights:
        return False
    old, new = before.weights.entry(name), after.weights.entry(name)
    return old is not new and tuple(old.shape) == tuple(new.shape) and old.dtype.is_floating_point


def _sqnr(reference: Tensor, value: Tensor) -> float:
    ratio = sqnr(reference, value)
    return -math.inf if math.isnan(ratio) else ratio


def _restored(
    step: Pass,
    before: Program,
    after: Program,
    journal: Journal,
    yardstick: Yardstick,
    changed: list[str],
) -> Deviation | None:
    """What is off although only weights were meant to change, with the old weights put back."""
    if journal.touched or len(unchanged_nodes(after, before)) == len(after.graph.nodes):
        return None
    if any(
        node.op == "get_attr" and node.target not in before.weights for node in after.graph.nodes
    ):
        return None
    common = [name for name in before.weights if name in after.weights]
    if any(before.weights.shape(name) != after.weights.shape(name) for name in common):
        return None  # a cut weight cannot be put back; the pass compares with its own twin
    back = after.copy()
    for name in changed:
        back.weights[name] = before.weights.entry(name)
    found = yardstick.compare(back, [], step.contract.growth)
    return next((d for d in found if d.broken), None)


__all__ = ["Attempt", "Judge", "LostWeight", "Progress", "Verdict", "quiet", "run_pass"]
