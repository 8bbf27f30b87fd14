"""What was done to a program: per pass the rewrites, declines, time, bytes and measured error."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Applied:
    """One numbered rewrite. `before` and `after` name the value it replaced and the new one."""

    number: int
    rule: str
    before: str
    after: str
    module: str
    note: str = ""


@dataclass(frozen=True)
class Declined:
    """One candidate that a rule left alone, and the sentence that says why."""

    rule: str
    value: str
    module: str
    reason: str

    def sentence(self) -> str:
        where = self.module or "the root module"
        return f"{self.rule}: {where}: %{self.value}: {self.reason}"


@dataclass(frozen=True)
class Measured:
    """Errors of a pass on probe inputs, against a float64 run of the incoming program.

    before, after: relative error of the incoming and of the outgoing program, worst touched value.
    measure: how they were taken; where: the touched value at which the outgoing error was worst.
    """

    measure: str
    before: float
    after: float
    allowed: float
    where: str = ""


@dataclass
class PassRecord:
    """One pass of a run."""

    name: str
    options: dict[str, Any]
    fidelity: str
    seconds: float = 0.0
    nodes: tuple[int, int] = (0, 0)
    nbytes: tuple[int, int] = (0, 0)
    applied: list[Applied] = field(default_factory=list[Applied])
    declined: list[Declined] = field(default_factory=list[Declined])
    measured: list[Measured] = field(default_factory=list[Measured])
    rolled_back: list[Applied] = field(default_factory=list[Applied])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        """One line for people."""
        parts = [f"{self.name}: {len(self.applied)} rewrites"]
        if self.declined:
            parts.append(f"{len(self.declined)} declined")
        if self.rolled_back:
            parts.append(f"{len(self.rolled_back)} rolled back")
        parts.append(f"{self.nodes[0]} -> {self.nodes[1]} nodes")
        if self.nbytes[0] != self.nbytes[1]:
            parts.append(f"{self.nbytes[0] / 1e6:.1f} -> {self.nbytes[1] / 1e6:.1f} MB")
        parts.extend(f"{m.measure} {m.after:.3g} (allowed {m.allowed:.3g})" for m in self.measured)
        return ", ".join(parts) + f", {self.seconds:.2f} s"


@dataclass
class History:
    """The records of all passes that made a program, oldest first."""

    records: list[PassRecord] = field(default_factory=list[PassRecord])

    def copy(self) -> History:
        return History(list(self.records))

    def __iter__(self):
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __str__(self) -> str:
        return "\n".join(record.line() for record in self.records)

    def to_json(self) -> list[dict[str, Any]]:
        return [record.to_json() for record in self.records]
