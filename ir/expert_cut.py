"""Cut experts out of a routed layer: router rows, stacks and literal sizes follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cut_graph import set_argument
from .edit import Editor, infer, same_size
from .errors import PlanishError
from .expert_axes import sizes
from .expert_layers import ExpertLayer
from .pattern import bound_arguments
from .program import Node, Program

_ATEN = torch.ops.aten
_SIZES = ("size", "shape")


class CannotCutExperts(PlanishError):
    """These experts cannot be cut: routing needs as many, or something on their axis is unknown."""


def check_kept(layer: ExpertLayer, count: int) -> None:
    """Raise CannotCutExperts unless `count` experts of the layer may stay."""
    if count == layer.experts:
        return
    legal = list(range(layer.least, layer.experts, layer.groups))
    if layer.why_not:
        raise CannotCutExperts(
            f"the experts of {layer.module} cannot be cut: {layer.why_not}",
            where=layer.module,
            expected="operations on the axis of the experts that are followed",
            found=layer.why_not,
            fix="cut FFN channels or layers instead",
        )
    if count not in legal:
        every = f", the same number of each of {layer.groups} groups" if layer.groups > 1 else ""
        raise CannotCutExperts(
            f"{count} of the {layer.experts} experts of {layer.module} cannot stay",
            where=layer.module,
            expected=f"{', '.join(map(str, legal)) or 'all of them'} that stay{every}",
            found=str(count),
            fix="cut fewer: the router chooses as many for each token as before",
        )


def cut_expert_rows(program: Program, layer: ExpertLayer, kept: Sequence[int]) -> None:
    """Keep the experts `kept` (sorted numbers) of a layer of this program, in place.

    Equal to the program whose router never chooses the others. Raises CannotCutExperts before
    anything is changed.
    """
    check_kept(layer, len(kept))
    member = len(kept) // layer.groups
    size = layer.experts // layer.groups
    in_group = [sum(number // size == group for number in kept) for group in range(layer.groups)]
    if any(count != member for count in in_group):
        raise CannotCutExperts(
            f"the groups of experts of {layer.module} would be of different sizes",
            where=layer.module,
            expected=f"{member} experts that stay in each of {layer.groups} groups",
            found=", ".join(map(str, in_group)),
        )
    fresh = {"expert": len(kept), "member": member, "group": layer.groups}
    for (value, axis), role in layer.axes.items():
        if value.op == "call_function" and role != "group":
            _set_size(value, axis, fresh[role])
    index = torch.tensor(list(kept))
    for name, axis in layer.weights.items():
        weight = program.weights[name]
        program.weights[name] = weight.index_select(axis, index).contiguous()
    _infer(program, {value for value, _ in layer.axes})
    for (value, axis), role in layer.axes.items():
        assert same_size(sizes(value)[axis], fresh[role]), value


def _set_size(node: Node, axis: int, size: int) -> None:
    """Change the literal from which an axis has its size, if it has it from one."""
    if node.target is _ATEN.one_hot.default:
        set_argument(node, "num_classes", size)
        return
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    given = bound_arguments(node)
    for name in _SIZES:
        literals: Any = given.get(name)
        if isinstance(literals, (list, tuple)):
            place = axis - len(sizes(node)) + len(literals)  # type: ignore[reportUnknownArgumentType]
            if place >= 0 and literals[place] != -1:
                fresh = [*literals[:place], size, *literals[place + 1 :]]
                set_argument(node, name, fresh)


def _infer(program: Program, touched: set[Node]) -> None:
    """Values of the touched nodes, and of all that follow as long as shapes change."""
    editor = Editor(program)
    changed: set[Node] = set()
    for node in program.graph.nodes:
        before = node.meta.get("val")
        if node.op == "get_attr" and node in touched:
            name = str(node.target)
            with editor.mode:
                shape = program.weights.shape(name)
                node.meta["val"] = torch.empty(shape, dtype=node.meta["val"].dtype)
            changed.add(node)
        elif node.op == "call_function" and (
            node in touched or any(read in changed for read in node.all_input_nodes)
        ):
            node.meta["val"] = infer(node, editor.mode)
            if not _same(before, node.meta["val"]):
                changed.add(node)


def _same(before: Any, after: Any) -> bool:
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return before.dim() == after.dim() and all(
        same_size(a, b) for a, b in zip(before.shape, after.shape, strict=True)
    )


__all__ = ["CannotCutExperts", "check_kept", "cut_expert_rows"]
