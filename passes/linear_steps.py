"""Operations that are linear in one value, with factors that follow from weights alone.

Each node that is one is read as a `Step`: a sum, a product with a matrix, a lookup in a table (the
product of a one-hot row with it), a convolution, a scaling by a constant, or a change of layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import same_size
from ..ir.pattern import bound_arguments
from ..ir.program import Node

_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default: ("self", "mat2"),
    _ATEN.bmm.default: ("self", "mat2"),
    _ATEN.matmul.default: ("self", "other"),
}
_LAYOUTS = {_ATEN.reshape.default, _ATEN.view.default, _ATEN._unsafe_view.default}
_CONVOLUTIONS = {
    _ATEN.conv1d.default,
    _ATEN.conv2d.default,
    _ATEN.conv3d.default,
    _ATEN.convolution.default,
}
_CASTS = {_ATEN._to_copy.default, _ATEN.to.dtype}


@dataclass(frozen=True)
class Step:
    """One linear operation.

    kind: "sum", "product", "lookup", "convolution", "scale" or "layout". reads: the values that
    it is linear in, each with its factor (1 but in sums). weight: the constant that it multiplies
    by (a node or a number). bias: constants that it adds, each with its factor. turned: the matrix
    is kept as [out, in]. inverse: it divides.
    """

    kind: str
    reads: tuple[tuple[Node, float], ...]
    weight: Any = None
    bias: tuple[tuple[Any, float], ...] = ()
    turned: bool = False
    inverse: bool = False
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


def read_step(node: Node, constant: set[Node]) -> Step | None:
    """The node as a linear operation, or None."""
    if node.op != "call_function" or node in constant or not _is_float(node):
        return None
    target: Any = node.target
    if target in (_ATEN.add.Tensor, _ATEN.sub.Tensor):
        return _sum(node, constant)
    if target in (_ATEN.mul.Tensor, _ATEN.div.Tensor):
        return _scale(node, constant)
    if target is _ATEN.neg.default:
        return Step("scale", ((_first(node), 1.0),), -1.0)
    if target in _LAYOUTS:
        return _layout(node)
    if target in _CASTS:
        return Step("layout", ((_first(node), 1.0),)) if _is_float(_first(node)) else None
    if target in _CONVOLUTIONS:
        return _convolution(node, constant)
    return _product(node, constant)


def _first(node: Node) -> Node:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_constant(value: Any, constant: set[Node]) -> bool:
    return value in constant if isinstance(value, fx.Node) else isinstance(value, (int, float))


def _sum(node: Node, constant: set[Node]) -> Step | None:
    given = bound_arguments(node)
    sign = -1.0 if node.target is _ATEN.sub.Tensor else 1.0
    alpha = given["alpha"]
    if not isinstance(alpha, (int, float)):
        return None
    terms = [(given["self"], 1.0), (given["other"], sign * alpha)]
    reads = tuple((v, f) for v, f in terms if not _is_constant(v, constant))
    added = tuple((v, f) for v, f in terms if _is_constant(v, constant))
    if not reads or not all(_like(node, value) for value, _ in reads):
        return None
    return Step("sum", reads, bias=added)


def _like(node: Node, value: Any) -> bool:
    """Whether a value is not broadcast by the node that reads it."""
    if not _is_float(value):
        return False
    ours, theirs = node.meta["val"].shape, value.meta["val"].shape
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(same_size(a, b) for a, b in pairs)


def _scale(node: Node, constant: set[Node]) -> Step | None:
    given = bound_arguments(node)
    value, factor = given["self"], given["other"]
    inverse = node.target is _ATEN.div.Tensor
    if not inverse and _is_constant(value, constant):
        value, factor = factor, value
    if _is_constant(value, constant) or not _is_constant(factor, constant):
        return None
    if not _like(node, value):
        return None
    return Step("scale", ((value, 1.0),), factor, inverse=inverse)


def _layout(node: Node) -> Step | None:
    """A regrouping of the leading axes: the last axis stays what it is."""
    value = _first(node)
    ours, theirs = node.meta["val"].shape, value.meta["val"].shape
    if not ours or not theirs or not same_size(ours[-1], theirs[-1]):
        return None
    return Step("layout", ((value, 1.0),))


def _product(node: Node, constant: set[Node]) -> Step | None:
    target: Any = node.target
    names: tuple[str, str, str | None] | None = None
    turned = False
    if target is _ATEN.linear.default:
        names, turned = ("input", "weight", "bias"), True
    elif target is _ATEN.addmm.default:
        names = ("mat1", "mat2", "self")
    elif target in _PRODUCTS:
        names = (*_PRODUCTS[target], None)
    elif target is _ATEN.embedding.default:
        return _lookup(node, constant)
    elif target is _ATEN.einsum.default:
        return _einsum(node, constant)
    if names is None:
        return None
    given = bound_arguments(node)
    if target is _ATEN.addmm.default and (given["beta"], given["alpha"]) != (1, 1):
        return None
    value, weight = given[names[0]], given[names[1]]
    bias = given[names[2]] if names[2] else None
    if value in constant or weight not in constant or weight.meta["val"].dim() < 2:
        return None
    if bias is not None and bias not in constant:
        return None
    added = () if bias is None else ((bias, 1.0),)
    return Step("product", ((value, 1.0),), weight, added, turned)


def _lookup(node: Node, constant: set[Node]) -> Step | None:
    given = bound_arguments(node)
    table, indices = given["weight"], given["indices"]
    if table not in constant or indices in constant:
        return None
    return Step("lookup", ((indices, 1.0),), table)


def _einsum(node: Node, constant: set[Node]) -> Step | None:
    """einsum("bsi,oi->bso", x, W) with a constant W is a product on the last axis."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)):
        return None
    left, _, out = equation.replace(" ", "").partition("->")
    names = left.split(",")
    if len(names) != 2 or len(operands) != 2:
        return None
    x, w = names
    value: Any = operands[0]
    weight: Any = operands[1]
    if value in constant or weight not in constant or len(w) != 2 or not x or not out:
        return None
    for turned in (False, True):
        i, o = (w[1], w[0]) if turned else (w[0], w[1])
        if x[-1] == i and out == x[:-1] + o and o not in x:
            return Step("product", ((value, 1.0),), weight, turned=turned)
    return None


def _convolution(node: Node, constant: set[Node]) -> Step | None:
    given = bound_arguments(node)
    value, weight, bias = given["input"], given["weight"], given["bias"]
    if value in constant or weight not in constant or given["groups"] != 1:
        return None
    if given.get("transposed") or (bias is not None and bias not in constant):
        return None
    padding = given["padding"]
    if isinstance(padding, str):
        return None
    spread = weight.meta["val"].dim() - 2
    if value.meta["val"].dim() != spread + 2:
        return None
    settings = {
        name: tuple(_spread(given[name], spread)) for name in ("stride", "padding", "dilation")
    }
    added = () if bias is None else ((bias, 1.0),)
    return Step("convolution", ((value, 1.0),), weight, added, True, settings=settings)


def _spread(value: Any, count: int) -> list[int]:
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in (listed * count if len(listed) == 1 else listed)]
