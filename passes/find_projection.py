"""The projection behind the keys, values or queries of an attention, found by walking back.

On the way may stand what moves values without changing them (MOVES, and a `cat` of parts that all
come from the one projection), norms, rotary embeddings, casts, factors and other operations on
single elements.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch

from ..ir.edit import same_size, shape, value_of
from ..ir.errors import PlanishError
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from ..ir.text import op_text

_ATEN = torch.ops.aten
ROTARY = torch.ops.planish.rotary.default
NORMS = {torch.ops.planish.rms_norm.default, _ATEN.layer_norm.default}
_TURNS = {_ATEN.permute.default, _ATEN.transpose.int, _ATEN.t.default}
MOVES = {
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
        (_ATEN.cat, "default"),
    )
} | {operator.getitem}


class NotTraceable(PlanishError):
    """`what` is one sentence why a value's channels cannot be followed back to a projection."""


@dataclass(frozen=True)
class Projection:
    """A matmul by a stored weight [out, in], or [in, out] if `transposed`; bias [out] or none.

    readers: the nodes by which the weight is read, the matmul or a transposition before it.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool
    readers: tuple[Node, ...]


def walk_to_projection(name: str, operand: Node) -> tuple[Projection, list[Node]]:
    """The one projection that a value comes from and the values on the way, in order."""
    path: set[Node] = set()
    sources: dict[Node, Projection] = {}
    left = [operand]
    while left:
        node = left.pop()
        if node in path or node in sources:
            continue
        projection = _projection(node)
        if projection is not None:
            sources[node] = projection
            continue
        path.add(node)
        before = node.all_input_nodes if node.target is _ATEN.cat.default else [data_of(node)]
        if None in before:
            raise NotTraceable(_strange(name, node))
        if len(before) > 1:
            _refuse_latent(name, before, shape(operand)[1])
        left += before
    if len(sources) > 1:
        names = " and ".join(sorted(f"%{node.name}" for node in sources))
        raise NotTraceable(f"the {name} are joined of {names}")
    (projection,) = sources.values()
    return projection, sorted(path)


def _refuse_latent(name: str, parts: list[Node], heads: int) -> None:
    for part in parts:
        if part.target is _ATEN.expand.default:
            sizes = zip(shape(part.args[0]), shape(part), strict=False)  # type: ignore[arg-type]
            if any(same_size(a, 1) and same_size(b, heads) for a, b in sizes):
                raise NotTraceable(
                    f"all heads share %{part.name}, a part of their {name}: they have one latent"
                )


def _strange(name: str, node: Node) -> str:
    if node.op != "call_function":
        return f"the {name} are not computed here but come in as %{node.name}"
    return (
        f"the {name} come from %{node.name} = {op_text(node)}, which is none of projection, "
        "layout, norm, rotary embedding and scaling"
    )


def _projection(node: Node) -> Projection | None:
    """Raises NotTraceable for a matmul whose weight is not stored."""
    if node.target is _ATEN.linear.default:
        given = bound_arguments(node)
        found = Projection(node, given["input"], given["weight"], given["bias"], False, (node,))
    elif node.target is _ATEN.addmm.default:
        given = bound_arguments(node)
        found = Projection(node, given["mat1"], given["mat2"], given["self"], True, (node,))
        if (given["beta"], given["alpha"]) != (1, 1):
            raise NotTraceable(f"%{node.name} scales its terms")
    elif node.target in (_ATEN.mm.default, _ATEN.matmul.default):
        first, second = node.args[:2]
        found = Projection(node, first, second, None, True, (node,))  # type: ignore[arg-type]
        if found.weight.target in _TURNS and value_of(found.weight).dim() == 2:
            stored: Any = found.weight.args[0]
            found = Projection(node, found.input, stored, None, False, (node, found.weight))
    else:
        return None
    parts = [found.weight] if found.bias is None else [found.weight, found.bias]
    for part, rank in zip(parts, (2, 1), strict=False):
        if part.op != "get_attr" or value_of(part).dim() != rank:
            raise NotTraceable(f"%{part.name}, which %{node.name} multiplies by, is not a weight")
    return found


def data_of(node: Node) -> Any:
    """The value that a step or a layout operation works on; None if it is neither."""
    if node.target in MOVES | NORMS | {ROTARY, _ATEN._to_copy.default}:
        return node.args[0]
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return None
    computed = [read for read in node.all_input_nodes if read.op != "get_attr"]
    return computed[0] if len(computed) == 1 else None
