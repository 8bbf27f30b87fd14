"""Numbers of a program against the one it came from, at the values a pass touched.

The incoming program runs in float64, which is the reference, and natively, which shows how much
rounding there was before; the outgoing program is compared while it runs. Of the reference only
the touched values are kept, the oldest in a temporary file once they pass a budget of memory;
of an exact comparison only digests are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .compare import count_nans, digest, epsilon, relative_deviation
from .errors import PassBroke
from .interpret import run
from .program import Node, Program
from .value_store import MEMORY, ValueStore

WIDE_LIMIT = 1e-7
"""Allowed relative difference of the float64 runs: constants that a model rounded to float32
(1 / sqrt(2), scales) may be re-rounded by a rewrite, functions may not change."""

_OUTPUT = "output {}"


@dataclass(frozen=True)
class Deviation:
    """How far a touched value of the new program lies from the old one.

    number: the rewrite (0: an output of the program). incoming, outgoing: relative error
    ||x - r|| / ||r|| against the float64 run r of the incoming program (EXACT: against its native
    run). wide: the same for a float64 run of the outgoing program, which only a new rounding of
    weights excuses. limit, wide_limit: what was allowed of outgoing and wide. nans: NaNs that the
    incoming program did not have. probe: the index of the probe on which this was worst.
    """

    number: int
    before: str
    after: str
    module: str
    incoming: float
    outgoing: float
    wide: float
    limit: float
    broken: bool
    nans: int = 0
    probe: int = 0
    wide_limit: float = WIDE_LIMIT

    @property
    def excess(self) -> tuple[bool, float]:
        """Orders deviations: broken ones first, then by how much of the limit they use."""
        share = self.outgoing / self.limit if self.limit else self.outgoing
        return self.broken, max(share, self.wide / self.wide_limit, float(self.nans))


@dataclass(frozen=True)
class Mark:
    """What is kept of one value of the incoming program."""

    error: float = 0.0
    epsilon: float = 0.0
    nans: int = 0
    digest: bytes = b""


Pair = tuple[int, str, str]
Seen = Callable[[str, Any], None]


class Yardstick:
    """The incoming program's values on the probes, natively and in float64, at chosen nodes."""

    def __init__(
        self,
        program: Program,
        probes: Sequence[Sequence[Any]],
        exact: bool,
        memory: int = MEMORY,
    ) -> None:
        self.program, self.probes, self.exact = program, probes, exact
        self._memory = memory
        self._wide = ValueStore(memory)
        self._marks: dict[tuple[int, str], Mark] = {}
        self._measured: set[str] = set()

    def compare(
        self,
        outgoing: Program,
        pairs: Sequence[Pair],
        growth: float,
        *,
        drift: bool = True,
        rounds_weights: bool = False,
    ) -> list[Deviation]:
        """Deviations at (number, old name, new name) pairs and at the outputs, in graph order.

        drift: also compare float64 runs (never for exact). rounds_weights: they may differ by as
        much as native rounding may, because weights were computed and rounded again. Pairs whose
        values are gone are left out. Raises PassBroke if the outgoing program does not run.
        """
        pairs = [*self._present(outgoing, pairs), *self._outputs()]
        self._measure({old for _, old, _ in pairs})
        wanted: dict[str, list[Pair]] = {}
        for pair in pairs:
            wanted.setdefault(pair[2], []).append(pair)
        worst: dict[Pair, Deviation] = {}
        modules = {node.name: node.meta.get("module", "") for node in outgoing.graph.nodes}
        for probe, inputs in enumerate(self.probes):
            compared = self._compare_probe(outgoing, probe, inputs, wanted, drift)
            for pair, (error, wide, nans) in compared.items():
                found = self._judge(pair, probe, error, wide, nans, growth, outgoing, modules)
                if rounds_weights:
                    found = excused(found)
                if pair not in worst or found.excess > worst[pair].excess:
                    worst[pair] = found
        order = {node.name: place for place, node in enumerate(outgoing.graph.nodes)}
        return sorted(worst.values(), key=lambda d: (order[d.after], d.number == 0, d.number))

    def _present(self, outgoing: Program, pairs: Iterable[Pair]) -> list[Pair]:
        old = {n.name for n in self.program.graph.nodes if n.op == "call_function"}
        new = {n.name for n in outgoing.graph.nodes if n.op == "call_function"}
        return [pair for pair in pairs if pair[1] in old and pair[2] in new]

    def _outputs(self) -> list[Pair]:
        names = [_OUTPUT.format(place) for place in range(len(self.program.results))]
        return [(0, name, name) for name in names]

    def _measure(self, names: set[str]) -> None:
        """Run the incoming program and keep what is not kept yet of the named values."""
        missing = names - self._measured
        if not missing:
            return

        for probe, inputs in enumerate(self.probes):
            if not self.exact:

                def keep_wide(name: str, value: Any, probe: int = probe) -> None:
                    self._wide[probe, name] = value

                _visit(self.program, inputs, missing, keep_wide, float64=True)

            def keep_mark(name: str, value: Any, probe: int = probe) -> None:
                self._marks[probe, name] = self._mark(probe, name, value)

            _visit(self.program, inputs, missing, keep_mark)
        self._measured |= missing

    def _mark(self, probe: int, name: str, value: Any) -> Mark:
        if self.exact:
            return Mark(digest=digest(value), nans=count_nans(value))
        error = relative_deviation(self._wide[probe, name], value)
        return Mark(error, epsilon(value), count_nans(value))

    def _compare_probe(
        self,
        outgoing: Program,
        probe: int,
        inputs: Sequence[Any],
        wanted: dict[str, list[Pair]],
        drift: bool,
    ) -> dict[Pair, tuple[float, float, int]]:
        """Per pair the outgoing error, the drift of the float64 runs and the new NaNs."""
        errors: dict[Pair, tuple[float, float, int]] = {}
        changed = ValueStore(self._memory)

        def native(name: str, value: Any) -> None:
            for pair in wanted[name]:
                mark = self._marks[probe, pair[1]]
                new_nans = max(0, count_nans(value) - mark.nans)
                if not self.exact:
                    error = relative_deviation(self._wide[probe, pair[1]], value)
                    errors[pair] = (error, 0.0, new_nans)
                elif digest(value) == mark.digest:
                    errors[pair] = (0.0, 0.0, 0)
                else:
                    changed[pair] = value
                    errors[pair] = (float("inf"), 0.0, new_nans)

        def wide(name: str, value: Any) -> None:
            for pair in wanted[name]:
                error, _, nans = errors[pair]
                errors[pair] = (error, relative_deviation(self._wide[probe, pair[1]], value), nans)

        _visit(outgoing, inputs, set(wanted), native)
        if drift and not self.exact:
            _visit(outgoing, inputs, set(wanted), wide, float64=True)
        self._tell_size(probe, inputs, errors, changed)
        return errors

    def _tell_size(
        self,
        probe: int,
        inputs: Sequence[Any],
        errors: dict[Pair, tuple[float, float, int]],
        changed: ValueStore,
    ) -> None:
        """For values that are not bit-equal: run the incoming program again, to say by how much."""
        differing = [pair for pair in errors if pair in changed]

        def measure(name: str, value: Any) -> None:
            for pair in differing:
                if pair[1] == name:
                    errors[pair] = (relative_deviation(value, changed[pair]), 0.0, errors[pair][2])

        if differing:
            _visit(self.program, inputs, {pair[1] for pair in differing}, measure)

    def _judge(
        self,
        pair: Pair,
        probe: int,
        error: float,
        wide: float,
        nans: int,
        growth: float,
        outgoing: Program,
        modules: dict[str, str],
    ) -> Deviation:
        number, old, new = pair
        mark = self._marks[probe, old]
        if number == 0:
            old, new = _result_name(self.program, old), _result_name(outgoing, new)
        if self.exact:
            differs = error > 0 or nans > 0
            limit = 0.0
        else:
            limit = max(growth * mark.error, 16 * mark.epsilon)
            differs = not (error <= limit and wide <= WIDE_LIMIT) or nans > 0
        return Deviation(
            number,
            old,
            new,
            modules.get(new, ""),
            mark.error,
            error,
            wide,
            limit,
            differs,
            nans,
            probe,
        )


def excused(found: Deviation) -> Deviation:
    """Judged again with the limit of native rounding for the float64 runs too."""
    allowed = max(WIDE_LIMIT, found.limit)
    broken = not (found.outgoing <= found.limit and found.wide <= allowed) or found.nans > 0
    return replace(found, wide_limit=allowed, broken=broken)


def _visit(
    program: Program,
    inputs: Sequence[Any],
    names: set[str],
    seen: Seen,
    *,
    float64: bool = False,
) -> None:
    """Call `seen` with the named values, as they are computed, and with the outputs."""

    def watch(node: Node, value: Any) -> None:
        if node.name in names:
            seen(node.name, value)

    try:
        results = run(program, inputs, float64=float64, watch=watch)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        raise PassBroke(
            "the program does not run on a probe",
            expected="values, as structure checks promise",
            found=f"{type(error).__name__}: {str(error)[:300]}",
            fix="see the chained error; run the passes one by one to find who broke it",
        ) from error
    for place, value in enumerate(results):
        if _OUTPUT.format(place) in names:
            seen(_OUTPUT.format(place), value)


def _result_name(program: Program, output: str) -> str:
    value = program.results[int(output.removeprefix(_OUTPUT.format("")))]
    return value.name if isinstance(value, Node) else program.output.name


__all__ = ["WIDE_LIMIT", "Deviation", "Mark", "Yardstick"]
