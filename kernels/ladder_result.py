"""What climbing the ladder gives: one outcome for each thing tried, as data that JSON can hold.

Rungs: 0 the operation as torch and ONNX see it; 1 the kernel in the repaired interpreter; 2 the
kernel compiled ahead of time; 3 its machine code within budgets; 4 its compiled code executed on
the CPU; 5 broken copies of that code, which rung 4 must catch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

RUNGS = (
    "the operation",
    "interpreted",
    "compiled",
    "budgets",
    "compiled code executed",
    "broken copies caught",
)
"""By number."""

Status = Literal["ok", "failed", "not run"]


@dataclass(frozen=True)
class Outcome:
    """One thing that was tried on a rung.

    what: the case, form or check; arch: whose code, "" where none was compiled; sentence: what was
    found; figures: further numbers by name.
    """

    kernel: str
    rung: int
    what: str
    status: Status
    sentence: str
    arch: str = ""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        return cls(**data)

    @property
    def title(self) -> str:
        """Case and architecture."""
        return f"{self.what}, {self.arch}" if self.arch else self.what


@dataclass(frozen=True)
class RungResult:
    """A kernel on a rung: failed if one thing failed, not run if nothing could be."""

    kernel: str
    rung: int
    status: Status
    sentence: str
    outcomes: tuple[Outcome, ...]

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        return {
            "kernel": self.kernel,
            "rung": self.rung,
            "name": RUNGS[self.rung],
            "status": self.status,
            "sentence": self.sentence,
            "seconds": round(self.seconds, 2),
            "outcomes": [one.to_json() for one in self.outcomes],
        }


def conclude(kernel: str, rung: int, outcomes: Iterable[Outcome]) -> RungResult:
    """The result of a rung from what was tried on it."""
    tried = tuple(outcomes)
    failed = [one for one in tried if one.status == "failed"]
    done = [one for one in tried if one.status == "ok"]
    left = [one for one in tried if one.status == "not run"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        first = failed[0].sentence.split("\n")[0]
        return RungResult(kernel, rung, "failed", f"{failed[0].title}: {first}{more}", tried)
    if not done:
        why = f"{left[0].title}: {left[0].sentence}" if left else "there is nothing to try"
        return RungResult(kernel, rung, "not run", why, tried)
    skipped = f"; {len(left)} not run, {left[0].title}: {left[0].sentence}" if left else ""
    return RungResult(kernel, rung, "ok", _summary(rung, done) + skipped, tried)


def _summary(rung: int, done: list[Outcome]) -> str:
    total = {name: sum(one.figures.get(name, 0) for one in done) for name in _COUNTED[rung]}
    counted = "".join(f", {total[name]:,} {name}" for name in _COUNTED[rung])
    survivors = [name for one in done for name in one.figures.get("survivors", ())]
    counted += f"; not: {', '.join(survivors)}" if survivors else ""
    noun = _NOUNS[rung] if len(done) == 1 else f"{_NOUNS[rung]}s"
    return f"{len(done)} {noun}{counted}"


_NOUNS = ("check", "case", "compilation", "budget", "execution", "program")
_COUNTED: tuple[tuple[str, ...], ...] = (
    (),
    (),
    (),
    (),
    ("instructions", "races", "shared wavefronts", "shared wavefronts at best"),
    ("broken copies", "caught"),
)
