"""The smallest folder that shows a fault: both sides of one rewrite, and the values that flow in.

`before/` and `after/` are programs (`planish.ir.program_folder`) that compute one value each from
the same recorded inputs; `fault.json` says what was found and what the contract allows.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..ir.errors import CorruptFile, OutputExists, SourceNotFound
from ..ir.graph_json import source_line
from ..ir.isolate import border, cut, input_names, record, shared_values
from ..ir.numerics import sqnr
from ..ir.program import Node, Program
from ..ir.program_folder import load_program, save_program
from ..ir.text import dtype_text, node_text, value_names
from ..ir.values_json import from_json, to_json
from ..ir.verify import Deviation, Yardstick
from .contract import Contract, Fidelity
from .culprit import Culprit
from .judge import Attempt, Judge

FAULT = "fault.json"
_LINES = 24


@dataclass(frozen=True)
class Fault:
    """One wrong rewrite in its surroundings: the programs without it and with it.

    full: the attempt with all rewrites. number 0: the pass is wrong with no rewrite applied.
    """

    judge: Judge
    good: Program
    bad: Attempt
    full: Attempt
    number: int
    place: tuple[int, int]


Pieces = tuple[Program, Program] | None


def describe(fault: Fault) -> tuple[Culprit, Pieces]:
    """The culprit, measured on the two pieces that differ; no pieces of a malformed program."""
    step, bad = fault.judge.step, fault.bad
    records = bad.journal.applied_records(bad.after)
    applied = next((a for a in records if a.number == fault.number), None)
    culprit = Culprit(
        kind="numbers",
        step=step.pass_name(),
        spelling=step.spelling(),
        place=fault.place[0],
        of=fault.place[1],
        number=fault.number,
        rewrites=fault.full.journal.count,
        rule=applied.rule if applied else "",
        before=applied.before if applied else "",
        after=applied.after if applied else "",
        module=applied.module if applied else "",
        fidelity=step.contract.fidelity.value,
    )
    verdict = bad.verdict
    if verdict.malformed is not None:
        message = str(verdict.malformed)
        where = culprit.module or verdict.malformed.where
        return dataclasses.replace(culprit, kind="malformed", message=message, module=where), None
    if verdict.lost is not None:
        return _weight_culprit(culprit, fault, verdict.lost.name)
    pair = _pair(fault)
    if pair is None:
        return culprit, None
    pieces, deviation = _isolate(fault, pair)
    return _measured(culprit, pieces, deviation), pieces


def _pair(fault: Fault) -> Deviation | None:
    """The value to show: the rewrite's own if it is off, else the first one that is."""
    broken = fault.bad.verdict.broken
    names = {node.name for node in fault.good.graph.nodes}
    if broken is not None and broken.number == fault.number > 0 and broken.before in names:
        return broken
    exact = fault.judge.yardstick.exact
    yard = Yardstick(fault.good, fault.judge.yardstick.probes, exact)
    pairs = [p for p in fault.bad.journal.final_pairs() if p[0] == fault.number]
    growth = fault.judge.step.contract.growth
    found = yard.compare(fault.bad.after, pairs, growth)
    off = [d for d in found if d.broken] or found or [broken]
    return off[0] if off else None


def _isolate(fault: Fault, pair: Deviation) -> tuple[tuple[Program, Program], Deviation]:
    """The pieces around the value, or, where they do not show the fault, all that leads to it."""
    good, bad = fault.good, fault.bad.after
    inputs = fault.judge.yardstick.probes[pair.probe]
    contract = fault.judge.step.contract
    shared = shared_values(good, bad)
    for common in (shared, {node.name for node in good.inputs}):
        names = list(dict.fromkeys([*border(good, pair.before, common)]))
        names += [n for n in border(bad, pair.after, common) if n not in names]
        values = record(good, names, inputs)
        called = input_names(good, names)
        pieces = cut(good, pair.before, values, called), cut(bad, pair.after, values, called)
        deviation = _deviation(*pieces, contract)
        if deviation.broken:
            return pieces, deviation
    return pieces, deviation  # type: ignore[reportPossiblyUnbound]


def _deviation(before: Program, after: Program, contract: Contract) -> Deviation:
    exact = contract.fidelity is Fidelity.EXACT
    yard = Yardstick(before, [list(before.examples)], exact)
    return yard.compare(after, [], contract.growth)[0]


def _measured(culprit: Culprit, pieces: tuple[Program, Program], deviation: Deviation) -> Culprit:
    before, after = pieces
    names_before, names_after = value_names(before.graph), value_names(after.graph)
    old, new = before.results[0], after.results[0]
    known = isinstance(new, Node)
    value = new.meta.get("val") if known else None
    return dataclasses.replace(
        culprit,
        before=culprit.before or (names_before[old] if isinstance(old, Node) else ""),
        after=culprit.after or (names_after[new] if known else ""),
        module=culprit.module or (new.meta.get("module", "") if known else ""),
        source=source_line(new) or (source_line(old) if isinstance(old, Node) else "")
        if known
        else "",
        tensor=_type(value),
        error_before=deviation.incoming,
        error_after=deviation.outgoing,
        allowed=deviation.limit,
        wide=deviation.wide,
        nans=deviation.nans,
        text_before=_text(before),
        text_after=_text(after),
    )


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_text(value.dtype)}[{', '.join(map(str, value.shape))}]"
    return type(value).__name__


def _text(program: Program) -> str:
    names = value_names(program.graph)
    lines = [node_text(n, names) for n in program.graph.nodes if n.op == "call_function"]
    if len(lines) > _LINES:
        lines = [f"... {len(lines) - _LINES} earlier values ...", *lines[-_LINES:]]
    return "\n".join(lines)


def _weight_culprit(culprit: Culprit, fault: Fault, name: str) -> tuple[Culprit, Pieces]:
    pieces = _weight_piece(fault.good, name), _weight_piece(fault.bad.after, name)
    lost = fault.bad.verdict.lost
    assert lost is not None
    entry = fault.bad.after.weights.entry(name)
    return (
        dataclasses.replace(
            culprit,
            kind="weight",
            before=name,
            after=name,
            module=name.rpartition(".")[0],
            tensor=f"{dtype_text(entry.dtype)}{list(entry.shape)}, {entry!r:.80}"
            if not isinstance(entry, Tensor)
            else _type(entry),
            error_before=float("inf"),
            error_after=lost.sqnr,
            allowed=lost.budget,
        ),
        pieces,
    )


def _weight_piece(program: Program, name: str) -> Program:
    node = next(n for n in program.weight_nodes() if n.target == name)
    return cut(program, node.name, {})


def write_reproducer(folder: Path, culprit: Culprit, pieces: Pieces, contract: Contract) -> Culprit:
    """Write the folder (aside, then renamed) and return the culprit that names it.

    Raises OutputExists.
    """
    if folder.exists():
        raise OutputExists(f"the folder {folder} exists", fix="choose another, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        if pieces is not None:
            save_program(pieces[0], aside / "before")
            save_program(pieces[1], aside / "after")
        form = {
            "planish_fault": 1,
            "culprit": to_json(culprit.to_json()),
            "growth": to_json(contract.growth),
            "pieces": pieces is not None,
        }
        (aside / FAULT).write_text(json.dumps(form, indent=1, allow_nan=False), "utf-8")
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return culprit.in_folder(str(folder))


def is_fault_folder(folder: str | Path) -> bool:
    return (Path(folder) / FAULT).is_file()


def replay(folder: str | Path) -> Culprit:
    """Compute both sides of a recorded fault again, natively and in float64.

    The numbers of the result are the new ones. Raises SourceNotFound and CorruptFile.
    """
    folder = Path(folder)
    culprit, growth, has_pieces = _read_fault(folder)
    culprit = culprit.in_folder(str(folder))
    if not has_pieces:
        return culprit
    before, after = load_program(folder / "before"), load_program(folder / "after")
    if culprit.kind == "weight":
        ratio = sqnr(before.weights[culprit.before], after.weights[culprit.after])
        return dataclasses.replace(culprit, error_after=ratio)
    contract = Contract(Fidelity(culprit.fidelity), growth=growth)
    with torch.no_grad():
        return _measured(culprit, (before, after), _deviation(before, after, contract))


def _read_fault(folder: Path) -> tuple[Culprit, float, bool]:
    file = folder / FAULT
    if not file.is_file():
        raise SourceNotFound(f"{folder} holds no {FAULT}", fix="check the path")
    try:
        form = cast("dict[str, Any]", json.loads(file.read_text("utf-8")))
        culprit = Culprit(**from_json(form["culprit"], {}, str(file)))
        culprit.headline()
        Fidelity(culprit.fidelity)
        return culprit, float(from_json(form["growth"], {}, str(file))), bool(form["pieces"])
    except (KeyError, TypeError, ValueError, AttributeError, CorruptFile) as error:
        raise CorruptFile(
            f"{FAULT} is damaged",
            where=str(file),
            expected="a fault as planish writes it",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            fix="let the pipeline write it again",
        ) from error


__all__ = ["Fault", "describe", "is_fault_folder", "replay", "write_reproducer"]
