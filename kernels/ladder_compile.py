"""Rungs 2 and 3: a kernel compiled for every architecture, and its machine code within budgets.

Catches what GPUs refuse and the interpreter accepts, spilled registers, blocks that do not fit,
tensor cores that are not used, and figures that grew against those that are checked in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from time import perf_counter

from .budget import Finding, compare, figures_by_key, read
from .catalog import triton_kernels
from .figures import Entry, Measured, measure
from .ladder_problem import Ask
from .ladder_result import Outcome
from .triton_spec import TritonSpec

COMPILED, WITHIN = 2, 3


def climb(spec: TritonSpec, ask: Ask) -> Iterator[Outcome]:
    """Two outcomes for each form, configuration, architecture and kind of hints."""
    forms = [form for form in spec.forms if ask.wants(form.name)]
    if not forms:
        yield Outcome(spec.name, COMPILED, "forms", "not run", "no form was asked for")
        yield Outcome(spec.name, WITHIN, "forms", "not run", "no form was asked for")
        return
    everything: list[Measured] = []
    for form in forms:
        for arch in ask.archs:
            started = perf_counter()
            measured = measure(dataclasses.replace(spec, forms=(form,)), (arch,))
            seconds = (perf_counter() - started) / max(1, len(measured))
            yield from (_compiled(spec, one, seconds) for one in measured)
            everything += measured
    yield from _within(spec, everything, ask)


def _compiled(spec: TritonSpec, one: Measured, seconds: float) -> Outcome:
    registers = max((figures.regs for figures in one.launches.values()), default=0)
    sentence = one.failure or f"{len(one.launches)} kernels, up to {registers} registers"
    status = "failed" if one.failure else "ok"
    return Outcome(spec.name, COMPILED, _what(one.entry), status, sentence, one.entry.arch, seconds)


def _within(spec: TritonSpec, measured: list[Measured], ask: Ask) -> Iterator[Outcome]:
    """The budgets of what compiled; a kernel that planish does not ship has rules only."""
    compiled = [one for one in measured if not one.failure]
    shipped = triton_kernels().get(spec.name) is spec
    kept = figures_by_key(compiled)
    if shipped:
        kept = {key: value for key, value in read().items() if ask.wants(key.split(" | ")[1])}
    found = compare(compiled, kept, [spec.name], ask.archs)
    for one in compiled:
        of_it = [finding for finding in found if _place(finding.key) == _place(one.entry.key())]
        told = "; ".join(_told(finding) for finding in of_it)
        figures = {key: value.to_json() for key, value in one.launches.items()}
        rules = "within its budget" if shipped else "no rule is broken"
        yield Outcome(
            spec.name,
            WITHIN,
            _what(one.entry),
            "failed" if of_it else "ok",
            told or rules,
            one.entry.arch,
            figures=figures,
        )
    failed = {_place(one.entry.key()) for one in measured if one.failure}
    known = {_place(one.entry.key()) for one in compiled} | failed
    for finding in found:
        if _place(finding.key) not in known:
            yield Outcome(spec.name, WITHIN, finding.key, "failed", _told(finding))


def _told(finding: Finding) -> str:
    return f"{finding.rule}: {finding.old} -> {finding.new}"


def _place(key: str) -> str:
    """Form, configuration, architecture and hints, of a budget's key."""
    return key.split(" | ", 1)[1]


def _what(entry: Entry) -> str:
    return f"{entry.form} [{entry.config}] {'with' if entry.hints else 'without'} hints"
