"""The projection behind the keys, values or queries of an attention, and which of its channels
each head reads.

The way from the projection to the attention is found by walking back, and what it does is not
matched but tried: every element of the projection's output is given a number, the layout
operations of the graph move the numbers, and where they arrive tells the order of heads and
channels, however query, key and value are packed and interleaved.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import same_size, shape, value_of
from ..ir.pattern import bound_arguments
from ..ir.positional import Positional, free_sizes, size_at
from ..ir.program import Node, Program
from ..ir.text import op_text

_ATEN = torch.ops.aten
ROTARY = torch.ops.planish.rotary.default
_NORMS = {torch.ops.planish.rms_norm.default, _ATEN.layer_norm.default}
_POINTWISE = {_ATEN.mul.Tensor, _ATEN.div.Tensor, _ATEN.add.Tensor}
_MOVES = {
    getattr(packet, overload)
    for packet, overload in (
        (_ATEN.reshape, "default"),
        (_ATEN.view, "default"),
        (_ATEN._unsafe_view, "default"),
        (_ATEN.transpose, "int"),
        (_ATEN.permute, "default"),
        (_ATEN.unsqueeze, "default"),
        (_ATEN.squeeze, "dim"),
        (_ATEN.expand, "default"),
        (_ATEN.slice, "Tensor"),
        (_ATEN.select, "int"),
        (_ATEN.split, "Tensor"),
        (_ATEN.split_with_sizes, "default"),
        (_ATEN.chunk, "default"),
        (_ATEN.unbind, "int"),
        (_ATEN.clone, "default"),
        (_ATEN.index_select, "default"),
    )
} | {operator.getitem}

BY_HEAD, BY_PLACE, JOINED = "[batch, head, place, channel]", "[batch, place, head, channel]", "flat"


class NotTraceable(Exception):
    """One sentence why a value's channels cannot be followed back to a projection."""


@dataclass(frozen=True)
class Projection:
    """A matmul by a stored weight [out, in], or [in, out] if `transposed`; bias [out] or none."""

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool


@dataclass(frozen=True)
class Operand:
    """Keys, values or queries [batch, heads, place, channel] and where they come from.

    channels: int64 [heads, channel], the projection's output channel that each one is made of.
    steps: what is computed on the way (norms, rotary embedding, factors), in order, with the layout
    in which it is done (None: it does not matter). path: every value on the way, the operand first.
    """

    name: str
    projection: Projection
    channels: Tensor
    steps: list[tuple[Node, str | None]]
    path: list[Node]

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
        projection, path = _walk(name, operand)
        steps = [node for node in reversed(path) if node.target not in _MOVES]
        numbers = self._numbers(projection, steps, operand)
        batch, _, places, _ = numbers[operand].shape
        grid = _Grid(batch, places, value_of(projection.node).shape[-1])
        layout, channels = grid.layout(numbers[operand])
        if layout != BY_HEAD:
            raise NotTraceable(
                f"the {name} do not keep the places of %{projection.node.name} apart"
            )
        found: list[tuple[Node, str | None]] = []
        for step in steps:
            kept = _needs_layout(step)
            found.append((step, grid.step_layout(step, numbers, channels) if kept else None))
        return Operand(name, projection, channels, found, path)

    def _numbers(self, projection: Projection, steps: list[Node], operand: Node) -> dict[Node, Any]:
        """The numbers at every value; a computing step hands them on, each in its place."""
        shape = [size_at(size, self._sizes) for size in value_of(projection.node).shape]
        total = torch.Size(shape).numel()
        given: dict[Node, Any] = {projection.node: torch.arange(total).reshape(shape)}
        for step in steps:
            given[step] = self._positional.evaluate(data_of(step), self._sizes, given)
        self._positional.evaluate(operand, self._sizes, given)
        return given


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

    def step_layout(self, step: Node, numbers: dict[Node, Any], channels: Tensor) -> str:
        layout, found = self.layout(numbers[data_of(step)])
        if not torch.equal(found.flatten(), channels.flatten()):
            raise NotTraceable(f"%{step.name} works on more, or in another order, than these heads")
        return layout


def _needs_layout(step: Node) -> bool:
    """Casts and factors that are numbers do the same in any layout."""
    return sum(isinstance(a, fx.Node) for a in step.args) > 1 or step.target in _NORMS


def _walk(name: str, operand: Node) -> tuple[Projection, list[Node]]:
    """The projection that a value comes from and the values on the way, the operand first."""
    path: list[Node] = []
    node = operand
    while (projection := _projection(node)) is None:
        path.append(node)
        before = data_of(node)
        if before is None:
            raise NotTraceable(_strange(name, node, shape(operand)[1]))
        node = before
    return projection, path


def _strange(name: str, node: Node, heads: int) -> str:
    if node.op != "call_function":
        return f"the {name} are not computed here but come in as %{node.name}"
    if node.target is not _ATEN.cat.default:
        return (
            f"the {name} come from %{node.name} = {op_text(node)}, which is none of projection, "
            "layout, norm, rotary embedding and scaling"
        )
    for part in node.all_input_nodes:
        if part.target is _ATEN.expand.default:
            sizes = zip(shape(part.args[0]), shape(part), strict=False)  # type: ignore[arg-type]
            if any(same_size(a, 1) and same_size(b, heads) for a, b in sizes):
                return f"all heads share %{part.name}, a part of their {name}: they have one latent"
    return f"the {name} are joined of {len(node.all_input_nodes)} values by %{node.name}"


def _projection(node: Node) -> Projection | None:
    """Raises NotTraceable for a matmul whose weight is not stored."""
    if node.target is _ATEN.linear.default:
        given = bound_arguments(node)
        found = Projection(node, given["input"], given["weight"], given["bias"], False)
    elif node.target is _ATEN.addmm.default:
        given = bound_arguments(node)
        found = Projection(node, given["mat1"], given["mat2"], given["self"], True)
        if (given["beta"], given["alpha"]) != (1, 1):
            raise NotTraceable(f"%{node.name} scales its terms")
    elif node.target in (_ATEN.mm.default, _ATEN.matmul.default):
        first, second = node.args[:2]
        found = Projection(node, first, second, None, True)  # type: ignore[arg-type]
    else:
        return None
    stored = [found.weight] if found.bias is None else [found.weight, found.bias]
    for part, rank in zip(stored, (2, 1), strict=False):
        if part.op != "get_attr" or value_of(part).dim() != rank:
            raise NotTraceable(f"%{part.name}, which %{node.name} multiplies by, is not a weight")
    return found


def data_of(node: Node) -> Any:
    """The value that a step or a layout operation works on; None if it is neither."""
    if node.target in _MOVES | _NORMS | {ROTARY, _ATEN._to_copy.default}:
        return node.args[0]
    if node.target not in _POINTWISE:
        return None
    read = [a for a in node.args[:2] if isinstance(a, fx.Node)]
    computed = [a for a in read if a.op != "get_attr"]
    return computed[0] if len(computed) == 1 else None
