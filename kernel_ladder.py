"""Verify Triton kernels without a GPU: climb the ladder, each group of rungs in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .ir.errors import MissingExtra, PlanishError, WrongOption
from .kernel_ladder_worker import TOGETHER
from .kernels.ladder_result import RUNGS, Outcome, RungResult, conclude
from .kernels.ladder_source import NotAKernelFile, UnknownKernel
from .kernels.occupancy import UnknownArch
from .kernels.triton_spec import ARCHS
from .kernels.triton_version import WrongTriton

Progress = Callable[[int, int, str], None]
"""Called with steps done, steps in all (0: not known yet), and what was found last."""

_KINDS: dict[str, type[PlanishError]] = {
    kind.__name__: kind for kind in (MissingExtra, NotAKernelFile, UnknownKernel, WrongTriton)
}

_POLL = 0.1


def verify_kernels(
    named: str,
    rungs: Sequence[int] = tuple(range(len(RUNGS))),
    archs: Sequence[str] = ARCHS,
    case: str = "",
    progress: Progress = lambda done, total, name: None,
) -> list[RungResult]:
    """Climb the rungs with a shipped kernel by name, with "all", or with a file that declares SPEC.

    case: only cases and forms with this text in their name. Results are by kernel, then by rung.
    Raises UnknownKernel, NotAKernelFile, MissingExtra, WrongTriton, UnknownArch, WrongOption.
    """
    for arch in archs:
        if arch not in ARCHS:
            raise UnknownArch.named(arch, ARCHS)
    groups = [wanted for group in TOGETHER if (wanted := [r for r in group if r in rungs])]
    found: dict[tuple[str, int], list[Outcome]] = {}
    for number, group in enumerate(groups):
        worker = _Worker(named, group, archs, case)
        for outcome in worker.outcomes():
            found.setdefault((outcome.kernel, outcome.rung), []).append(outcome)
            total = len(groups) * len(worker.kernels)
            done = number * len(worker.kernels) + max(0, len(worker.begun) - 1)
            progress(done, total, f"{outcome.kernel}, {RUNGS[outcome.rung]}: {outcome.title}")
        for kernel in worker.kernels:
            for rung in group:
                found.setdefault((kernel, rung), [])
    if case and not any(one.status != "not run" for tried in found.values() for one in tried):
        raise WrongOption(
            f"nothing on these rungs has {case!r} in its name",
            expected="a part of the name of a case or of a form",
            fix="leave --case out to see what there is",
        )
    kernels = list(dict.fromkeys(kernel for kernel, _ in found))
    return [
        conclude(kernel, rung, found[kernel, rung]) for kernel in kernels for rung in sorted(rungs)
    ]


def parse_rungs(text: str) -> tuple[int, ...]:
    """ "0-5" or "1,4" as numbers; raises WrongOption.

    >>> parse_rungs("0-2,4")
    (0, 1, 2, 4)
    """
    rungs: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdigit() and (last.isdigit() or not last)):
            raise _wrong_rungs(text)
        rungs |= {*range(int(first), int(last or first) + 1)}
    if not rungs or max(rungs) >= len(RUNGS):
        raise _wrong_rungs(text)
    return tuple(sorted(rungs))


def _wrong_rungs(text: str) -> WrongOption:
    listed = ", ".join(f"{number} {name}" for number, name in enumerate(RUNGS))
    return WrongOption(
        f"{text!r} does not name rungs", expected="for example 0-5, or 1,4", fix=f"known: {listed}"
    )


@dataclass
class _Worker:
    """The processes for one group of rungs: a second one only where the first died."""

    named: str
    group: Sequence[int]
    archs: Sequence[str]
    case: str
    kernels: list[str] = field(default_factory=list[str])
    begun: list[str] = field(default_factory=list[str])

    def outcomes(self) -> Iterator[Outcome]:
        """What is found, as it is found; a process that dies is a failure of its kernel."""
        while True:
            before = len(self.begun)
            with tempfile.TemporaryDirectory() as folder:
                died = yield from self._one_process(Path(folder))
            if died is None:
                return
            if len(self.begun) == before:
                raise PlanishError("a process of the ladder died", found=died)
            yield Outcome(self.begun[-1], self.group[0], "the process", "failed", died)

    def _one_process(self, folder: Path) -> Iterator[Outcome]:
        out, told = folder / "outcomes", folder / "stderr"
        out.touch()
        with told.open("w") as errors, out.open(encoding="utf-8") as lines:
            process = subprocess.Popen(self._command(out), env=self._environment(), stderr=errors)
            try:
                while process.poll() is None:
                    yield from self._read(lines)
                    time.sleep(_POLL)
                yield from self._read(lines)
            finally:
                process.kill()
                process.wait()
        if process.returncode == 0:
            return None
        last = told.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return f"ended with code {process.returncode}: {last[0]}"

    def _read(self, lines: IO[str]) -> Iterator[Outcome]:
        while line := lines.readline():
            said: dict[str, Any] = json.loads(line)
            if "error" in said:
                raise _KINDS.get(said["error"].pop("kind"), PlanishError)(**said["error"])
            if "kernels" in said:
                self.kernels = said["kernels"]
            if "begin" in said:
                self.begun.append(said["begin"])
            if "outcome" in said:
                yield Outcome.from_json(said["outcome"])

    def _command(self, out: Path) -> list[str]:
        rungs = [str(rung) for rung in self.group]
        worker = [sys.executable, "-P", "-m", "planish.kernel_ladder_worker", self.named]
        options = ["--out", str(out), "--archs", ",".join(self.archs), "--case", self.case]
        return [*worker, *options, "--done", ",".join(self.begun), "--rungs", *rungs]

    def _environment(self) -> dict[str, str]:
        kept = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
        return {**kept, "TRITON_INTERPRET": "1"} if 1 in self.group else kept
