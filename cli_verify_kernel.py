"""The command that verifies a Triton kernel on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cli_print import progress_bar, show, table
from .kernel_ladder import parse_rungs, verify_kernels
from .kernels.ladder_result import RUNGS, RungResult
from .kernels.triton_spec import ARCHS

_LISTED = 10


def verify(named: str, rungs: str, archs: str | None, case: str) -> dict[str, Any]:
    """Climb, print a table and what failed; the same as data, with "ok"."""
    chosen = [arch.strip() for arch in archs.split(",")] if archs else list(ARCHS)
    with progress_bar("climbing") as advance:
        results = verify_kernels(named, parse_rungs(rungs), chosen, case, advance)
    _print(results)
    failed = any(result.status == "failed" for result in results)
    return {"ok": not failed, "results": [result.to_json() for result in results]}


def _print(results: Sequence[RungResult]) -> None:
    columns = ("kernel", "rung", "result", "seconds", "what was found")
    rows = [
        (
            one.kernel,
            f"{one.rung} {RUNGS[one.rung]}",
            one.status,
            f"{one.seconds:.1f}",
            one.sentence,
        )
        for one in results
    ]
    show(table(columns, rows))
    for result in results:
        for outcome in [one for one in result.outcomes if one.status == "failed"][:_LISTED]:
            rung = f"{outcome.kernel}, rung {outcome.rung}"
            show(f"failed: {rung}, {outcome.title}: {outcome.sentence}")
