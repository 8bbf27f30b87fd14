"""`planish explain`: the report of a model, or the replay of a recorded fault."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from .api import explain, trace
from .cli_print import show, working
from .passes.reproducer import is_fault_folder, replay


def explain_source(source: Path) -> dict[str, Any]:
    """Print what planish makes of a model or a fault folder; the same as data."""
    if is_fault_folder(source):
        with working(f"replay {source}"):
            culprit = replay(source)
        show(str(culprit))
        return {"kind": "fault", **asdict(culprit)}
    with working(f"capture {source}"):
        program = trace(source)
    with working("raise"):
        report = explain(program)
    show(str(report))
    if len(program.history):
        show("history:")
        for record in program.history:
            show(f"  {record.line()}")
    return {"kind": "report", "source": str(source), **report.to_json()}
