"""One process of the ladder: climbs some rungs with some kernels and writes what it finds, line by
line, so that what was found before a crash is not lost.

Interpreting and compiling kernels exclude each other within a process, so rung 1 has its own.
Lines are JSON: {"kernels": names}, {"begin": [kernel, rung]}, {"outcome": ...}, {"error": ...}.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .ir.errors import PlanishError
from .kernels.ladder_problem import Ask
from .kernels.ladder_result import Outcome
from .kernels.ladder_source import find_kernels
from .kernels.triton_spec import ARCHS, TritonSpec

TOGETHER = ((0,), (1,), (2, 3), (4, 5))
"""Rungs that one process climbs."""

_CLIMBERS = {
    0: ("planish.kernels.ladder_operator", "planish.kernel_ladder_onnx"),
    1: ("planish.kernels.ladder_interpret",),
    2: ("planish.kernels.ladder_compile",),
    3: ("planish.kernels.ladder_compile",),
    4: ("planish.kernels.ladder_execute",),
    5: ("planish.kernels.ladder_mutants",),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Climb as the command line says; mistakes of the caller become an error line."""
    asked = _parse(arguments)
    torch.set_num_threads(1)
    with Path(asked.out).open("a", encoding="utf-8") as out:

        def write(**line: Any) -> None:
            out.write(json.dumps(line, default=str) + "\n")
            out.flush()

        try:
            specs = find_kernels(asked.kernels)
        except PlanishError as error:
            write(error={"kind": type(error).__name__, **_parts(error)})
            return
        write(kernels=[spec.name for spec in specs])
        ask = Ask(tuple(asked.archs.split(",")), asked.case)
        for spec in specs:
            if spec.name in asked.done.split(","):
                continue
            write(begin=spec.name)
            for outcome in climbed(spec, asked.rungs, ask):
                write(outcome=outcome.to_json())


def climbed(spec: TritonSpec, rungs: Sequence[int], ask: Ask) -> Iterator[Outcome]:
    """What a kernel gives on rungs that one process can climb together."""
    modules = dict.fromkeys(name for rung in rungs for name in _CLIMBERS[rung])
    for name in modules:
        for outcome in importlib.import_module(name).climb(spec, ask):
            if outcome.rung in rungs:
                yield outcome


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="planish.kernel_ladder_worker")
    parser.add_argument("kernels")
    parser.add_argument("--out", required=True)
    parser.add_argument("--rungs", type=int, nargs="+", required=True)
    parser.add_argument("--archs", default=",".join(ARCHS))
    parser.add_argument("--case", default="")
    parser.add_argument("--done", default="", help="kernels to leave out")
    return parser.parse_args(arguments)


def _parts(error: PlanishError) -> dict[str, str]:
    return {name: getattr(error, name) for name in ("what", "where", "expected", "found", "fix")}


if __name__ == "__main__":
    main()
