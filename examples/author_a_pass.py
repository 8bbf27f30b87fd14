"""Author a pass: the rewrite, the run on a model, the check of its numbers, the explanation.

Run it with `python examples/author_a_pass.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from planish import Node, Program, RulePass, contract, op, rewrite, trace
from planish.ir.text import program_diff
from planish.passes.pipeline import Pipeline
from torch import Tensor, nn


# The pass: 15 lines.
@rewrite
def log_softmax(x: Node, axis: int):
    return op.log(op.softmax(x, axis))


@log_softmax.unless
def probabilities_are_kept(root: Node) -> str | None:
    readers = len(root.all_input_nodes[0].users)
    return None if readers == 1 else f"{readers} values read the probabilities, not only the log"


@log_softmax.to
def stable(x: Node, axis: int) -> Node:
    return op.log_softmax(x, axis)


@dataclass(frozen=True)
class StableLogSoftmax(RulePass):
    """Compute log(softmax(x)) in one step, which never takes the log of a zero."""

    contract = contract("bounded", requires=["functional"])
    rules = (log_softmax,)


class TwoHeads(nn.Module):
    """A classifier with two outputs; the second one keeps its probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.label, self.topic = nn.Linear(12, 7), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        topic = self.topic(x).softmax(-1)
        return self.label(x).softmax(-1).log(), topic.log(), topic


def main() -> tuple[Program, Program]:
    """Run the pass on a model with verify="numbers", and print what it did and did not do."""
    torch.manual_seed(0)
    before = trace(TwoHeads(), (torch.randn(4, 12),))
    after = Pipeline([StableLogSoftmax()], verify="numbers", on_break="raise").run(before)
    print(program_diff(before, after))
    for record in after.history:
        print(record.line())
        for declined in record.declined:
            print(f"  declined {declined.sentence()}")
    return before, after


if __name__ == "__main__":
    main()
