"""One product in the place of a region of linear branches: the base product with another weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_arg

from ..ir.edit import Editor, shape
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .find_adapter_branch import Region

_ATEN = torch.ops.aten
_BIAS_PLACES = {
    _ATEN.linear.default: 2,
    _ATEN.addmm.default: 0,
    _ATEN.conv1d.default: 2,
    _ATEN.conv2d.default: 2,
    _ATEN.conv3d.default: 2,
    _ATEN.convolution.default: 2,
}


@dataclass(frozen=True)
class Base:
    """The product that stays, its weight, and the way from x through it to the root."""

    product: Node
    weight: Node
    turned: bool
    path: tuple[Node, ...]

    @property
    def bias(self) -> Node | None:
        given = bound_arguments(self.product)
        target: Any = self.product.target
        return given["self"] if target is _ATEN.addmm.default else given.get("bias")

    @property
    def out_channels(self) -> int:
        channels = self.product.target in _CONVOLVED
        return int(shape(self.product)[1 if channels else -1])


_CONVOLVED = {target for target in _BIAS_PLACES if "conv" in str(target)}


def find_base(region: Region) -> Base | None:
    """The largest product of x itself with a plain weight, that leads to the root unprojected."""
    best: Base | None = None
    for node in region.products:
        weight, turned = plain_weight(region.steps[node].weight, region.steps[node].turned)
        if weight.op != "get_attr":
            continue
        below, above = _down(node, region), _up(node, region)
        if below is None or above is None:
            continue
        size = weight.meta["val"].numel()
        if best is None or size > best.weight.meta["val"].numel():
            best = Base(node, weight, turned, (*below, node, *above))
    return best


def plain_weight(weight: Node, turned: bool) -> tuple[Node, bool]:
    """The weight below a transposition, and whether it is kept as [out, in]."""
    last = ([-2, -1], [0, 1]) if weight.meta["val"].dim() == 2 else ([-2, -1],)
    target: Any = weight.target
    spelled = target is _ATEN.t.default or (
        target is _ATEN.transpose.int and sorted(weight.args[1:]) in last  # type: ignore[type-var]
    )
    if target is _ATEN.permute.default:
        spelled = list(weight.args[1]) == [1, 0]  # type: ignore[arg-type]
    if not spelled:
        return weight, turned
    below: Any = weight.args[0]
    return below, not turned


def _down(node: Node, region: Region) -> list[Node] | None:
    """Changes of layout between x and the product, scalings left out; None if more lies there."""
    path: list[Node] = []
    value = region.steps[node].reads[0][0]
    while value is not region.source:
        step = region.steps[value]
        if step.kind == "layout":
            path.insert(0, value)
        elif step.kind != "scale":
            return None
        value = step.reads[0][0]
    return path


def _up(node: Node, region: Region) -> list[Node] | None:
    """Changes of layout between the product and the end of its branch."""
    path: list[Node] = []
    ends = {term for term, _ in region.terms}
    value = node
    while value not in ends:
        above = [u for u in value.users if u in region.steps]
        if not above or region.steps[above[0]].kind not in ("layout", "scale", "sum"):
            return None
        value = above[0]
        if region.steps[value].kind == "layout":
            path.append(value)
    return path


def stored(base: Base, matrix: Tensor) -> Tensor:
    """M as the base product keeps its weight."""
    if base.product.target in _CONVOLVED or not base.turned:
        return matrix
    return matrix.transpose(-1, -2)


def put_in_place(editor: Editor, region: Region, base: Base, bias: Node | None) -> Node:
    """Emit the way from x through the base product, and the addends that were not merged."""
    with editor.at(region.root, base.product.meta.get("module", "")):
        value = region.source
        for node in base.path:
            below = region.steps[node].reads[0][0]
            value = _again(editor, node, below, value, base, bias)
        editor.module = region.root.meta.get("module", "")
        for other, factor in region.others:
            value = added(editor, value, other, factor)
    return value


def _again(
    editor: Editor, node: Node, below: Node, value: Node, base: Base, bias: Node | None
) -> Node:
    args: Any = map_arg(node.args, lambda read: value if read is below else read)
    if node is not base.product:
        return editor.emit(node.target, *args, **node.kwargs)
    place = _BIAS_PLACES.get(node.target)  # type: ignore[arg-type]
    if bias is None or bias is base.bias:
        return editor.emit(node.target, *args, **node.kwargs)
    if place is None:
        return editor.emit(_ATEN.add.Tensor, editor.emit(node.target, *args, **node.kwargs), bias)
    filled = [*args, None][: max(len(args), place + 1)]
    filled[place] = bias
    kwargs = {name: given for name, given in node.kwargs.items() if name != "bias"}
    return editor.emit(node.target, *filled, **kwargs)


def added(editor: Editor, value: Node, other: Any, factor: float) -> Node:
    if not isinstance(other, Node):
        return editor.emit(_ATEN.add.Tensor, value, factor * other)
    if factor == 1:
        return editor.emit(_ATEN.add.Tensor, other, value)
    return editor.emit(_ATEN.add.Tensor, value, other, alpha=factor)
