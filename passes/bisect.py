"""Find the pass, and in it the single numbered rewrite, that makes a program wrong.

Delta debugging over a history of steps (Zeller 1999), by bisection: first over the passes of a
pipeline, then over the rewrites of the pass that is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..ir.errors import PassBroke
from ..ir.program import Program
from ..ir.rewrite import Journal
from ..ir.verify import Yardstick
from .contract import Fidelity, Pass
from .culprit import Culprit
from .judge import Attempt, Judge, Progress, Verdict, quiet, run_pass
from .reproducer import Fault, describe, write_reproducer


def bisect(
    program: Program,
    passes: Sequence[Pass],
    probes: Sequence[Sequence[Any]],
    folder: str | Path | None = None,
    *,
    calibration: Sequence[list[Any]] = (),
    progress: Progress = quiet,
) -> Culprit | None:
    """The pass and the rewrite that make `program` wrong, or None if all contracts are kept.

    Runs all passes once, searches the first prefix of them that is off, holds that pass to its own
    contract (so that a right pass is never accused), then searches its rewrites. probes,
    calibration: flat input lists. folder: where to write a reproducer.
    """
    search = _PassSearch(program, list(passes), probes, list(calibration), progress)
    place = search.first_wrong()
    if place is None:
        return None
    judge, full = search.judged(place)
    number = find_rewrite(judge, full)
    return accuse(judge, full, number, (), (place + 1, len(passes)), folder)


def accuse(
    judge: Judge,
    full: Attempt,
    number: int | None,
    skip: Iterable[int],
    place: tuple[int, int],
    folder: str | Path | None = None,
) -> Culprit:
    """Describe the rewrite (None: the pass apart from its rewrites), and write a reproducer."""
    good = judge.before
    bad = judge.attempt(limit=number or 0, skip=skip)
    if number is not None:
        good = judge.attempt(limit=number - 1, skip=skip, numbers=False).after
    fault = Fault(judge, good, bad, full, number or 0, place)
    culprit, pieces = describe(fault)
    if folder is None:
        return culprit
    return write_reproducer(Path(folder), culprit, pieces, judge.step.contract)


def find_rewrite(judge: Judge, full: Attempt, skip: Iterable[int] = ()) -> int | None:
    """The rewrite at which the pass goes from right to wrong, all earlier ones applied.

    None if it is wrong with no rewrite at all. The number counts with `skip` left out.
    """
    skip = tuple(skip)
    known: dict[int, bool] = {full.journal.count: True}

    def wrong(limit: int) -> bool:
        if limit not in known:
            known[limit] = judge.attempt(limit, skip).verdict.wrong
        return known[limit]

    verdict = full.verdict
    if verdict.lost is not None and verdict.lost.number:
        return verdict.lost.number
    guess = verdict.broken.number if verdict.broken else 0
    return _first_wrong_number(full.journal.count, guess, wrong)


def _first_wrong_number(count: int, guess: int, wrong: Callable[[int], bool]) -> int | None:
    good, bad = -1, count
    if 0 < guess <= count:  # the first value that is off usually names the culprit
        if wrong(guess):
            bad = guess
            if not wrong(guess - 1):
                return guess
            bad = guess - 1
        else:
            good = guess
    if good < 0:
        if wrong(0):
            return None
        good = 0
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if wrong(middle) else (middle, bad)
    return bad


def find_culprit(
    step: Pass,
    before: Program,
    yardstick: Yardstick,
    journal: Journal,
    verdict: Verdict,
    skipped: set[int],
    calibration: list[list[Any]] | None = None,
) -> int | None:
    """`find_rewrite` for a pass that was run and verified by hand."""
    judge = Judge(step, before, yardstick.probes, calibration)
    judge.yardstick = yardstick
    return find_rewrite(judge, Attempt(before, journal, verdict), skipped)


@dataclass
class _Prefix:
    """The program after some passes, and how the values of its segment's start are called now."""

    program: Program
    start: int
    names: dict[str, str]
    hidden: bool = False
    """Whether the last pass touched values that the segment's start does not have."""


class _PassSearch:
    def __init__(
        self,
        program: Program,
        passes: list[Pass],
        probes: Sequence[Sequence[Any]],
        calibration: list[list[Any]],
        progress: Progress,
    ) -> None:
        self.program, self.passes, self.probes = program, passes, probes
        self.calibration, self.progress = calibration, progress
        self.prefixes = [_Prefix(program, 0, {})]
        self._right: set[int] = set()
        self._wrong: dict[int, tuple[Judge, Attempt]] = {}
        self._yardsticks: dict[tuple[int, bool], Yardstick] = {}

    def judged(self, place: int) -> tuple[Judge, Attempt]:
        """The judge of the pass at a place, and the pass's run in full."""
        if place in self._wrong:
            return self._wrong[place]
        judge = Judge(
            self.passes[place], self.prefixes[place].program, self.probes, self.calibration
        )
        return judge, judge.attempt()

    def first_wrong(self) -> int | None:
        """The place of the first pass that breaks its contract."""
        malformed = self._run_all()
        done = len(self.prefixes) - 1
        good, bad = 0, done + 1
        ends = self._segment_ends(done)
        for end in ends:  # one segment between passes judged on their own after another
            if self._on_its_own(end - 1):
                if self._own_wrong(end - 1):
                    return end - 1
            elif self._prefix_wrong(end):
                bad = end
                break
            good = end
        if bad <= done:
            place = self._search(good, bad) - 1
            if self._own_wrong(place):
                return place
        suspects = range(done) if bad <= done else self._hidden_places()
        for place in suspects:
            if self._own_wrong(place):
                return place
        return malformed

    def _search(self, good: int, bad: int) -> int:
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if self._prefix_wrong(middle) else (middle, bad)
        return bad

    def _run_all(self) -> int | None:
        """Run every pass; the place of the first that leaves a malformed program."""
        for place, step in enumerate(self.passes):
            self.progress(place, len(self.passes), step.pass_name())
            last = self.prefixes[-1]
            try:
                after, journal = run_pass(step, last.program, self.calibration)
            except PassBroke:
                return place
            self.prefixes.append(self._next(place, last, after, journal))
        return None

    def _next(self, place: int, last: _Prefix, after: Program, journal: Journal) -> _Prefix:
        if self._on_its_own(place):
            return _Prefix(after, place + 1, {})
        names, hidden = dict(last.names), False
        alive = [{node.name for node in p.program.graph.nodes} for p in self._segment(last.start)]
        now = {new: old for old, new in names.items()}
        live = {node.name for node in after.graph.nodes}
        for _, old, new in journal.final_pairs():
            origin = now.get(old)
            if origin is None and all(old in nodes for nodes in alive):
                origin = old
            if origin is None:
                hidden = True
            else:
                names[origin] = new
        names = {origin: new for origin, new in names.items() if new in live}
        return _Prefix(after, last.start, names, hidden)

    def _segment(self, start: int) -> list[_Prefix]:
        return self.prefixes[start:]

    def _segment_ends(self, done: int) -> list[int]:
        """Prefix lengths to look at first: around passes judged on their own, and the whole."""
        ends = {done} if done else set[int]()
        for place in range(done):
            if self._on_its_own(place):
                ends |= {place, place + 1} - {0}
        return sorted(ends)

    def _on_its_own(self, place: int) -> bool:
        """Whether what comes after the pass cannot be compared with what was before it."""
        contract = self.passes[place].contract
        return contract.fidelity is Fidelity.LOSSY or contract.changes_interface

    def _own_wrong(self, place: int) -> bool:
        """Whether the pass breaks its own contract."""
        if place in self._right:
            return False
        if place not in self._wrong:
            self.progress(place, len(self.passes), f"verify {self.passes[place].pass_name()}")
            judge, attempt = self.judged(place)
            if not attempt.verdict.wrong:
                self._right.add(place)
                return False
            self._wrong[place] = judge, attempt
        return True

    def _hidden_places(self) -> list[int]:
        return [place for place, after in enumerate(self.prefixes[1:]) if after.hidden]

    def _prefix_wrong(self, length: int) -> bool:
        """Whether the first passes together leave their segment's start outside its bounds."""
        prefix = self.prefixes[length]
        if any(len(probe) != len(prefix.program.inputs) for probe in self.probes):
            return False  # a pass gave the program other inputs
        between = self.passes[prefix.start : length]
        growth = max((p.contract.growth for p in between), default=1.0)
        exact = all(p.contract.fidelity is Fidelity.EXACT for p in between)
        self.progress(length, len(self.passes), f"verify the first {length}")
        key = (prefix.start, exact)
        if key not in self._yardsticks:
            start = self.prefixes[prefix.start].program
            self._yardsticks[key] = Yardstick(start, self.probes, exact)
        pairs = [(1, old, new) for old, new in prefix.names.items()]
        try:
            found = self._yardsticks[key].compare(prefix.program, pairs, growth)
        except PassBroke:
            return True
        return any(deviation.broken for deviation in found)


__all__ = ["Culprit", "accuse", "bisect", "find_culprit", "find_rewrite"]
