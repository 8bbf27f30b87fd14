"""Run a benchmark: heats of contestants in memory together, rounds in which they take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .bench_measures import Measure
from .bench_prepare import Prepared, prepare
from .bench_process import ANSWER_SECONDS, Cannot, Interpreters, Worker, launch
from .bench_quality import measure_quality
from .bench_results import Results
from .bench_roster import BenchModel, Contestant
from .bench_text import BenchText


@dataclass(frozen=True)
class Plan:
    """What to run on one model. contestants: the first one is the baseline of ratios.

    place: where what contestants load is kept. slices: of text, for quality.
    """

    model: BenchModel
    contestants: Sequence[Contestant]
    measures: Sequence[Measure]
    text: BenchText
    place: Path
    threads: Sequence[int] = (1, 2)
    rounds: int = 5
    pythons: Interpreters = field(default_factory=Interpreters)


@dataclass
class Entrant:
    """A contestant with its folder, and its process while it is in a heat."""

    plan: Plan
    row: Contestant
    prepared: Prepared
    threads: int
    worker: Worker | None = None

    @property
    def about(self) -> dict[str, Any]:
        """The keys of its records."""
        return {
            "model": self.plan.model.name,
            "contestant": self.row.name,
            "key": self.prepared.key,
            "threads": self.threads,
        }

    def open(self) -> Worker:
        """Its process, loaded; raises Cannot."""
        if self.worker is None or not self.worker.alive:
            order = {"do": "serve", "module": self.row.module, "options": self.row.options}
            more = {"path": str(self.prepared.path), "threads": self.threads}
            told = {**order, **more, "model": self.plan.model.told()}
            self.worker = launch(self.plan.pythons.of(self.row), told)
            self.worker.loaded = self.worker.answer(ANSWER_SECONDS)
        return self.worker

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None


def run(plan: Plan, results: Results, tell: Callable[[str], None]) -> None:
    """Measure all that the results do not have yet; `tell` hears what goes on."""
    for threads in plan.threads:
        measure_limits(threads, results, tell)
    ready = list(_prepared(plan, results, tell))
    for threads in plan.threads:
        entrants = [Entrant(plan, row, made, threads) for row, made in ready]
        for heat in _heats(entrants):
            _run_heat(plan, heat, results, tell)


def measure_limits(threads: int, results: Results, tell: Callable[[str], None]) -> None:
    """The machine's limits, in a process of their own."""
    if results.get("limits", threads=threads) is None:
        tell(f"limits of the machine, {threads} threads")
        command = [sys.executable, "-m", "planish.bench_limits", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results.add("limits", **json.loads(done.stdout.strip().splitlines()[-1]))


def _prepared(
    plan: Plan, results: Results, tell: Callable[[str], None]
) -> Iterator[tuple[Contestant, Prepared]]:
    """Those that can take part; of the others the results say why not."""
    for row in plan.contestants:
        about = {"model": plan.model.name, "contestant": row.name}
        tell(f"{plan.model.name}: prepare {row.name}")
        try:
            made = prepare(row, plan.model, plan.place, plan.pythons, plan.text.calibration_file())
        except Cannot as reason:
            results.add("cannot", **about, measure="everything", why=str(reason))
            continue
        cost = dict(made.made)
        told = {"size": made.size, "cost": cost, "versions": dict(made.versions)}
        fields = {"heat": row.heat, "peer": row.peer, "compute": row.compute}
        results.add("prepared", **about, key=made.key, **told, **fields)
        facts = {key: cost[key] for key in ("bits", "head_bits") if key in cost}
        yield Contestant(**{**row.__dict__, **facts}), made


def _heats(entrants: Sequence[Entrant]) -> list[list[Entrant]]:
    """The baseline with the rows of each heat."""
    base, *others = entrants
    names = list(dict.fromkeys(entrant.row.heat for entrant in others))
    return [[base, *(e for e in others if e.row.heat == name)] for name in names] or [[base]]


def _run_heat(
    plan: Plan, heat: list[Entrant], results: Results, tell: Callable[[str], None]
) -> None:
    """In parts, where not all fit into memory at once; the baseline is in every part."""
    base, *waiting = heat
    waiting = [entrant for entrant in waiting if _missing(plan, entrant, results)]
    if not waiting and not _missing(plan, base, results):
        return
    try:
        while True:
            taking, waiting = _load(plan, [base, *waiting], results, tell)
            if base not in taking:
                return
            measure_quality(plan, taking, results, tell)
            for measure in plan.measures:
                _measure(measure, taking, results, tell)
            for entrant in taking:
                _tell_memory(entrant, results)
                entrant.close()
            if not waiting:
                return
    finally:
        for entrant in heat:
            entrant.close()


def _missing(plan: Plan, entrant: Entrant, results: Results) -> bool:
    names = [measure.name for measure in plan.measures]
    speed = [results.get("speed", **entrant.about, measure=name) for name in names]
    return None in speed or results.get("quality", **{**entrant.about, "threads": None}) is None


def _load(
    plan: Plan, entrants: Sequence[Entrant], results: Results, tell: Callable[[str], None]
) -> tuple[list[Entrant], list[Entrant]]:
    """Start as many as fit into memory with their caches: those that run, those that wait."""
    largest = max((m.batch * (m.prompt + 128) for m in plan.measures), default=0)
    room = 0.85 * available_memory()
    running: list[Entrant] = []
    for number, entrant in enumerate(entrants):
        tell(f"{plan.model.name}, {entrant.threads} threads: load {entrant.row.name}")
        try:
            loaded = entrant.open().loaded
        except Cannot as reason:
            _cannot(entrant, "loading", reason, results)
            entrant.close()
            continue
        kept = 2 * largest * plan.model.cache * entrant.row.cache_bits / 8
        room -= loaded["peak"] + kept
        if room < 0 and len(running) > 1:
            entrant.close()
            return running, list(entrants[number:])
        results.add("loaded", **entrant.about, **loaded)
        running.append(entrant)
    return running, []


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _measure(
    measure: Measure, taking: Sequence[Entrant], results: Results, tell: Callable[[str], None]
) -> None:
    """One measure of all that lack it, with the baseline beside them in every round."""
    base, *others = taking
    lacking = [e for e in others if not results.get("speed", **e.about, measure=measure.name)]
    if not lacking and results.get("speed", **base.about, measure=measure.name):
        return
    plan = base.plan
    tell(f"{plan.model.name}, {base.threads} threads: {measure.name}")
    asked = [base, *lacking]
    first = {e.row.name: _begin(measure, e, results) for e in asked}
    asked = [e for e in asked if first[e.row.name] is not None]
    rounds: dict[str, list[dict[str, Any]]] = {e.row.name: [] for e in asked}
    for turn in range(plan.rounds):
        for place in range(len(asked)):
            entrant = asked[(turn + place) % len(asked)]
            found = _ask(measure, entrant, results)
            if found is not None:
                rounds[entrant.row.name].append(found)
    baseline = [found["wall"] for found in rounds.get(base.row.name, [])]
    for entrant in asked:
        taken = rounds[entrant.row.name]
        if len(taken) == plan.rounds:
            told = {"walls": [t["wall"] for t in taken], "cpus": [t["cpu"] for t in taken]}
            told |= {"base": baseline, "work": taken[0]["work"], "unit": measure.unit}
            nbytes, operations = measure.cost(plan.model, entrant.row)
            told |= {"first": first[entrant.row.name], "calls": measure.new or 1}
            cost = {"bytes": nbytes, "operations": operations}
            about = {**entrant.about, "measure": measure.name}
            results.add("speed", **about, **told, **cost, compute=entrant.row.compute)


def _begin(measure: Measure, entrant: Entrant, results: Results) -> float | None:
    """What comes before the rounds; the seconds of the first round, compiling included.

    None if it cannot.
    """
    first: float | None = None
    try:
        for order in measure.begin(entrant.plan.text.tokens):
            first = entrant.open().ask(order)["wall"]
    except Cannot as reason:
        _cannot(entrant, measure.name, reason, results)
        return None
    return first


def _ask(measure: Measure, entrant: Entrant, results: Results) -> dict[str, Any] | None:
    if entrant.worker is None or not entrant.worker.alive:
        return None
    try:
        return entrant.worker.ask(measure.round(entrant.plan.text.tokens))
    except Cannot as reason:
        _cannot(entrant, measure.name, reason, results)
        return None


def _tell_memory(entrant: Entrant, results: Results) -> None:
    if entrant.worker is not None and entrant.worker.alive:
        results.add("memory", **entrant.about, **entrant.worker.ask({"do": "memory"}))


def _cannot(entrant: Entrant, what: str, reason: Cannot, results: Results) -> None:
    results.add("cannot", **entrant.about, measure=what, why=str(reason))
