"""Which channels of a projection each head of an attention's keys, values or queries is made of.

What stands between the projection and the attention is not matched but tried: every element of the
projection's output is given a number, the layout operations of the graph move the numbers, and
where they arrive tells the order of heads and channels, however query, key and value are packed
and interleaved. A computing step leaves a mark on the numbers that go through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import value_of
from ..ir.positional import Positional, free_sizes, size_at
from ..ir.program import Node, Program
from .find_projection import (
    MOVES,
    NORMS,
    NotTraceable,
    Projection,
    data_of,
    walk_to_projection,
)

_MOST_STEPS = 24
BY_HEAD, BY_PLACE, JOINED = "[batch, head, place, channel]", "[batch, place, head, channel]", "flat"


@dataclass(frozen=True)
class Step:
    """What is computed on the way: a norm, a rotary embedding, a factor.

    layout: the one in which it is done; None where that does not matter. block: the channels
    [start, end) of each head that it works on; None for all.
    """

    node: Node
    layout: str | None
    block: tuple[int, int] | None


@dataclass(frozen=True)
class Operand:
    """Keys, values or queries [batch, heads, place, channel] and where they come from.

    channels: int64 [heads, channel], the projection's output channel that each one is made of.
    steps: what is computed on the way, in order. path: every value on the way, the operand last.
    """

    name: str
    projection: Projection
    channels: Tensor
    steps: list[Step]
    path: list[Node]

    @property
    def value(self) -> Node:
        return self.path[-1]

    @property
    def heads(self) -> int:
        return self.channels.shape[0]


class HeadTracer:
    """Traces operands of one program's attentions, at sizes of its own choice."""

    def __init__(self, program: Program) -> None:
        self._positional = Positional(program)
        symbols = sorted(free_sizes(program).items(), key=lambda item: str(item[0]))
        self._sizes = {s: least + place for place, (s, (least, _, _)) in enumerate(symbols)}

    def trace(self, name: str, operand: Node) -> Operand:
        """name: "keys", ... for sentences. Raises NotTraceable."""
        projection, path = walk_to_projection(name, operand)
        steps = [node for node in path if node.target not in MOVES]
        if len(steps) > _MOST_STEPS:
            raise NotTraceable(f"the {name} are computed in {len(steps)} steps")
        total = torch.Size(self._sizes_of(projection.node)).numel()
        numbers = self._numbers(projection, steps, operand, total)
        arrived = numbers[operand]
        grid = _Grid(arrived.shape[0], arrived.shape[2], value_of(projection.node).shape[-1])
        layout, channels = grid.layout(arrived % total)
        if layout != BY_HEAD or any(len(row.unique()) < len(row) for row in channels):
            raise NotTraceable(f"the {name} do not keep the channels of %{projection.node.name}")
        found: list[Step] = []
        for place, step in enumerate(steps):
            passed = (arrived // total >> place) % 2 == 1
            before = numbers[data_of(step)] % total
            found.append(grid.step(step, before, channels, _block(step, passed)))
        return Operand(name, projection, channels, found, path)

    def _sizes_of(self, node: Node) -> list[int]:
        return [size_at(size, self._sizes) for size in value_of(node).shape]

    def _numbers(
        self, projection: Projection, steps: list[Node], operand: Node, total: int
    ) -> dict[Node, Any]:
        """The numbers at every value. A computing step hands them on, each in its place, and leaves
        its mark: the numbers that went through step i hold total << i."""
        given: dict[Node, Any] = {
            projection.node: torch.arange(total).reshape(self._sizes_of(projection.node))
        }
        for place, step in enumerate(steps):
            before = self._positional.evaluate(data_of(step), self._sizes, given)
            given[step] = before + (total << place)
        self._positional.evaluate(operand, self._sizes, given)
        return given


def _block(step: Node, passed: Tensor) -> tuple[int, int] | None:
    """The channels [start, end) of each head that went through a step; None if all did."""
    if bool(passed.all()):
        return None
    columns = passed[0, 0, 0].nonzero().flatten().tolist()
    start, end = (columns[0], columns[-1] + 1) if columns else (0, 0)
    wanted = torch.zeros(passed.shape[-1], dtype=torch.bool)
    wanted[start:end] = True
    if not columns or not bool((passed == wanted).all()):
        raise NotTraceable(f"%{step.name} works on some heads or scattered channels only")
    return start, end


@dataclass(frozen=True)
class _Grid:
    """The numbers of a projection's output: batch x places rows of `columns` channels."""

    batch: int
    places: int
    columns: int

    def layout(self, numbers: Tensor) -> tuple[str, Tensor]:
        """How rows and channels lie in a value, and the channels of one row."""
        wanted = torch.arange(self.batch * self.places).reshape(self.batch, self.places)
        lead, size = (self.batch, self.places), tuple(numbers.shape)
        forms: list[tuple[str, Tensor, Tensor]] = []
        if numbers.dim() == 3 and size[:2] == lead:
            forms.append((JOINED, wanted[:, :, None], numbers[:1, :1]))
        if numbers.dim() == 4 and size[:2] == lead:
            forms.append((BY_PLACE, wanted[:, :, None, None], numbers[:1, :1]))
        if numbers.dim() == 4 and size[0::2] == lead:
            forms.append((BY_HEAD, wanted[:, None, :, None], numbers[:1, :, :1]))
        for layout, rows, first in forms:
            channels = first % self.columns
            if torch.equal(numbers, rows * self.columns + channels):
                return layout, channels.squeeze(2 if layout == BY_HEAD else 1).squeeze(0)
        raise NotTraceable("its heads lie in a layout that is not followed")

    def step(
        self, node: Node, numbers: Tensor, channels: Tensor, block: tuple[int, int] | None
    ) -> Step:
        """numbers: those of the value that the step works on."""
        if not _needs_layout(node):
            return Step(node, BY_PLACE if block else None, block)
        layout, found = self.layout(numbers)
        wanted = channels[:, slice(*block)] if block else channels
        whole = layout == JOINED and block is None
        if not torch.equal(found, wanted.flatten() if whole else wanted):
            raise NotTraceable(f"%{node.name} works on more, or in another order, than these heads")
        return Step(node, layout, block)


def _needs_layout(step: Node) -> bool:
    """Casts and factors that are numbers do the same in any layout."""
    return sum(isinstance(a, fx.Node) for a in step.args) > 1 or step.target in NORMS
