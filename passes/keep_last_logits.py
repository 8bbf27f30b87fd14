"""Compute the logits of the last positions only, which is all that generating text reads.

Before: `%logits = linear(norm(%x), %head)`, a row for each of the `length` positions.
After: `%y = slice(%x, 1, max(length - count, 0)); %logits = linear(norm(%y), %head)`.
Equal on the rows that are kept, because everything between the last attention and the logits
computes each position on its own. How far up the cut may go is read from the graph: a value is
computed for the last positions alone when all its readers are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..ir.edit import Editor, same_size, value_of
from ..ir.errors import PassBroke
from ..ir.interpret import run
from ..ir.program import Node, Program
from .contract import Context, Pass, contract

_ATEN = torch.ops.aten
_PLANISH = torch.ops.planish
_ROWWISE = {
    _ATEN.linear.default,
    _ATEN._to_copy.default,
    _ATEN.dropout.default,
    _PLANISH.rms_norm.default,
    _PLANISH.gated.default,
    _PLANISH.quick_gelu.default,
}
_END = 9223372036854775807


@dataclass(frozen=True)
class KeepLastLogits(Pass):
    """Logits of the last `count` positions, [batch, min(count, length), vocabulary]."""

    count: int = 1

    contract = contract("bounded", requires=["functional"], changes_interface=True)

    def run(self, program: Program, context: Context) -> None:
        place = logits_place(program)
        if place is None:
            context.journal.declined(self.pass_name(), "", _NO_LOGITS)
            return
        logits: Node = program.results[place]
        length = value_of(logits).shape[1]
        region = _last_only(program, logits, length)
        if not region:
            reason = f"%{logits.name} is not computed position by position"
            context.journal.declined(self.pass_name(), logits, reason)
            return
        if not context.journal.offers():
            return
        plain = program.copy()
        made = _Cut(program, region, length, self.count).build()
        results = program.results
        results[place] = made[logits]
        program.output.args = (results,)
        Editor(program).sweep()
        program.metadata["last_logits"] = self.count
        context.journal.noted(self.pass_name(), made[logits])
        _check(plain, program, place, self.count)


_NO_LOGITS = "no result has the form [batch, length, vocabulary] with a free length"


def logits_place(program: Program) -> int | None:
    """Which flat result is the logits: the widest [batch, free length, width], else None."""
    widths: dict[int, int] = {}
    for place, result in enumerate(program.results):
        value = result.meta.get("val") if isinstance(result, fx.Node) else None
        if not isinstance(value, Tensor) or value.dim() != 3 or not value.is_floating_point():
            continue
        if not isinstance(value.shape[1], int) and isinstance(value.shape[2], int):
            widths.setdefault(place, value.shape[2])
    return max(widths, key=lambda place: widths[place]) if widths else None


def _last_only(program: Program, logits: Node, length: Any) -> set[Node]:
    """The values that need be known at the last positions only."""
    found: set[Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if node.op != "call_function" or not _is_rowwise(node, length):
            continue
        readers = set(node.users)
        if node is logits:
            alone = sum(result is node for result in program.results) == 1
            readers.discard(program.output)
            if alone and not readers:
                found.add(node)
        elif readers and readers <= found:
            found.add(node)
    return found


def _has_rows(node: Any, length: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == 3 and same_size(value.shape[1], length)


def _is_rowwise(node: Node, length: Any) -> bool:
    """Whether row i of the result is computed from row i of each operand that has rows."""
    target: Any = node.target
    if not _has_rows(node, length):
        return False
    if target is _ATEN.layer_norm.default:
        return len(node.args[1]) <= 1 and _others_have_no_rows(node, length)  # type: ignore[arg-type]
    if target is _ATEN.slice.Tensor:
        return node.args[1] in (2, -1)  # columns
    if target is _ATEN.matmul.default:
        rows, matrix = node.args[:2]
        flat = isinstance(matrix, fx.Node) and value_of(matrix).dim() == 2
        return flat and _has_rows(rows, length)
    pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return (pointwise or target in _ROWWISE) and _others_have_no_rows(node, length)


def _others_have_no_rows(node: Node, length: Any) -> bool:
    """Every operand has the rows on its axis 1, or is the same for all rows."""
    operands = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    rows = [n for n in operands if _has_rows(n, length)]
    if node.target is _ATEN.linear.default:
        return bool(rows) and node.args[0] is rows[0] and len(rows) == 1
    rest = [n for n in operands if n not in rows]
    return bool(rows) and all(_same_for_all_rows(value_of(n)) for n in rest)


def _same_for_all_rows(value: Tensor) -> bool:
    axis = value.dim() - 2
    return axis < 0 or (isinstance(value.shape[axis], int) and value.shape[axis] == 1)


class _Cut:
    """Emits a region again for the last positions."""

    def __init__(self, program: Program, region: set[Node], length: Any, count: int) -> None:
        self.program, self.region, self.length, self.count = program, region, length, count
        self.editor = Editor(program)
        self.made: dict[Node, Node] = {}
        self.start: Any = None

    def build(self) -> dict[Node, Node]:
        for node in [n for n in self.program.graph.nodes if n in self.region]:
            with self.editor.at(node):
                args = map_arg(node.args, self._last)
                kwargs = map_arg(node.kwargs, self._last)
                self.made[node] = self.editor.emit(node.target, *args, **kwargs)
        return self.made

    def _last(self, node: Node) -> Node:
        if node not in self.made:
            if not _has_rows(node, self.length):
                return node
            start = self._start(node)
            self.made[node] = self.editor.emit(_ATEN.slice.Tensor, node, 1, start, _END)
        return self.made[node]

    def _start(self, node: Node) -> Any:
        if self.count == 1:
            return -1
        if self.start is None:
            length = self.editor.emit(_ATEN.sym_size.int, node, 1)
            before = self.editor.emit(operator.sub, length, self.count)
            self.start = self.editor.emit(torch.sym_max, before, 0)
        return self.start


def _check(plain: Program, cut: Program, place: int, count: int) -> None:
    """On the examples the kept rows are those of the whole, to the rounding of a matmul."""
    if not plain.examples:
        return
    whole = run(plain, list(plain.examples), float64=True)[place][:, -count:]
    kept = run(cut, list(cut.examples), float64=True)[place]
    if kept.shape != whole.shape or not torch.allclose(kept, whole, rtol=1e-9, atol=1e-9):
        raise PassBroke(
            "keep_last_logits changes the logits it keeps",
            expected=f"the last {count} rows of float64 {list(whole.shape)}",
            found=f"float64 {list(kept.shape)}",
            fix="leave keep_last_logits out of the recipe",
        )
