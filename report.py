"""What was recognized and what was left alone: the report that `planish explain` prints."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .ir.encoded import Encoded
from .ir.history import Applied, Declined, History
from .ir.program import Program


@dataclass
class Report:
    """raised: kind -> (raised, candidates). declines: a sentence for each one left alone.

    notes: what was raised with a remark, for example a mask that stays explicit. kernels: of a
    quantized program, what computes each product with a weight on the CPU.
    """

    raised: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    declines: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    parameters: int = 0
    nbytes: int = 0
    nodes: int = 0
    history: list[str] = field(default_factory=list[str])
    kernels: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        lines = [
            f"{self.parameters:,} parameters, {self.nbytes / 1e6:.1f} MB of weights, "
            f"{self.nodes} operations"
        ]
        width = max((len(kind) for kind in self.raised), default=0)
        for kind, (raised, candidates) in sorted(self.raised.items()):
            lines.append(f"  {kind:<{width}}  {raised} of {candidates} raised")
        lines += [f"  - {sentence}" for sentence in self.declines]
        lines += [f"  note: {sentence}" for sentence in self.notes]
        if self.kernels:
            from .codegen.explain_products import grouped

            lines.append("products with weights, on the CPU:")
            lines += [f"  {line}" for line in grouped(self.kernels)]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "raised": {kind: list(counts) for kind, counts in self.raised.items()},
            "declines": self.declines,
            "notes": self.notes,
            "parameters": self.parameters,
            "nbytes": self.nbytes,
            "nodes": self.nodes,
            "history": self.history,
            "kernels": self.kernels,
        }


def report(program: Program) -> Report:
    """The report of a program; one that was never raised is raised on a copy first."""
    from .recipes import pipeline

    if not any(record.name.startswith("raise_") for record in program.history):
        program = pipeline("raise").run(program)
    applied, declined = _of_raising(program.history)
    raised = Counter(entry.rule for entry in applied)
    left = Counter(entry.rule for entry in declined)
    return Report(
        raised={k: (raised[k], raised[k] + left[k]) for k in sorted(raised | left)},
        declines=[entry.sentence() for entry in declined],
        notes=_unique(f"{e.rule}: {e.module}: {e.note}" for e in applied if e.note),
        parameters=program.parameter_count(),
        nbytes=program.nbytes(),
        nodes=sum(node.op == "call_function" for node in program.graph.nodes),
        history=[record.line() for record in program.history],
        kernels=_kernels(program),
    )


def _kernels(program: Program) -> list[str]:
    """What computes each product of a quantized program; nothing for one that is all dense."""
    if not any(isinstance(program.weights.entry(name), Encoded) for name in program.weights):
        return []
    from .codegen.explain_products import product_sentences

    return product_sentences(program)


def _of_raising(history: History) -> tuple[list[Applied], list[Declined]]:
    records = [record for record in history if record.name.startswith("raise_")]
    applied = [entry for record in records for entry in record.applied]
    declined = [entry for record in records for entry in record.declined]
    return applied, declined


def _unique(sentences: Any) -> list[str]:
    return list(dict.fromkeys(sentences))
