"""How operations tie axes that have one entry for each expert.

An axis is (value, number). A tie says that two axes have the same role, or, where a view takes the
experts apart into groups, which role one has when the other has its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .edit import same_size
from .errors import PlanishError
from .pattern import bound_arguments
from .program import Node

_ATEN = torch.ops.aten
Role = Literal["expert", "group", "member"]
"""expert: one entry for each expert. group, member: the two axes of experts taken apart."""
Axis = tuple[Node, int]
Tie = tuple[Axis, Role | None, Axis, Role | None]
"""Both axes have these roles, or neither; None: whatever role the other has."""


class NotFollowed(PlanishError):
    """An operation on an axis of experts that is not understood."""


def sizes(value: Node) -> list[Any]:
    """The sizes of a tensor, of the first of several for `topk`; empty for other values."""
    held = value.meta.get("val")
    held = held[0] if isinstance(held, (tuple, list)) and held else held
    return list(held.shape) if isinstance(held, Tensor) else []


def ties(node: Node) -> list[Tie]:
    """The ties of one operation; raises NotFollowed for one that is not known."""
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return list(_same(node, source)) if source.target is _ATEN.topk.default else []
    handler = _HANDLERS.get(node.target)
    if handler is not None:
        return list(handler(node, bound_arguments(node)))
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return list(_pointwise(node, {}))
    raise NotFollowed(f"{node.target} is not followed along the experts")


def _tie(a: Node, axis: int, b: Node, other: int) -> Tie:
    return (a, axis), None, (b, other), None


def _same(node: Node, source: Any, without: Sequence[int] = ()) -> Iterator[Tie]:
    for axis in range(len(sizes(source))):
        if axis not in without:
            yield _tie(node, axis, source, axis)


def _pointwise(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    wide = sizes(node)
    for read in node.all_input_nodes:
        own = sizes(read)
        shift = len(wide) - len(own)
        for axis, size in enumerate(own):
            if same_size(size, wide[axis + shift]):
                yield _tie(node, axis + shift, read, axis)


def _like_self(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    return _same(node, given["self"])


def _made(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    yield from ()


def _view(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    """Sizes are compared from the last on; one that is the product of two is taken apart."""
    source: Node = given["self"]
    before, after = sizes(source), sizes(node)
    i, j = len(before) - 1, len(after) - 1
    while i >= 0 and j >= 0:
        if same_size(before[i], after[j]):
            yield _tie(node, j, source, i)
            i, j = i - 1, j - 1
        elif j > 0 and _product(before[i], after[j - 1], after[j]):
            yield (source, i), "expert", (node, j - 1), "group"
            yield (source, i), "expert", (node, j), "member"
            i, j = i - 1, j - 2
        elif i > 0 and _product(after[j], before[i - 1], before[i]):
            yield (node, j), "expert", (source, i - 1), "group"
            yield (node, j), "expert", (source, i), "member"
            i, j = i - 2, j - 1
        else:
            return


def _product(whole: Any, a: Any, b: Any) -> bool:
    return isinstance(whole, int) and isinstance(a, int) and isinstance(b, int) and whole == a * b


def _unsqueeze(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    place = given["dim"] % len(sizes(node))
    for axis in range(len(sizes(given["self"]))):
        yield _tie(node, axis + (axis >= place), given["self"], axis)


def _squeeze(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    rank = len(sizes(given["self"]))
    if len(sizes(node)) == rank:
        yield from _same(node, given["self"])
        return
    place = given["dim"] % rank
    for axis in range(rank):
        if axis != place:
            yield _tie(node, axis - (axis > place), given["self"], axis)


def _transpose(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    rank = len(sizes(node))
    order = list(range(rank))
    a, b = (given["dim0"], given["dim1"]) if "dim0" in given else (-1, -2)
    if rank > 1:
        order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    for axis, old in enumerate(order):
        yield _tie(node, axis, given["self"], old)


def _permute(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    for axis, old in enumerate(given["dims"]):
        yield _tie(node, axis, given["self"], old % len(given["dims"]))


def _reduced(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    """Sums and largest values: what is missing counts as 0, or as less than all others."""
    source, rank = given["self"], len(sizes(given["self"]))
    dims = given.get("dim")
    dims = range(rank) if dims in (None, []) else [dims] if isinstance(dims, int) else dims
    gone = {axis % rank for axis in dims}
    place = 0
    for axis in range(rank):
        if axis not in gone:
            yield _tie(node, place, source, axis)
        place += axis not in gone or bool(given.get("keepdim"))


def _topk(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    return _same(node, given["self"], [given["dim"] % len(sizes(given["self"]))])


def _gather(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    place = given["dim"] % len(sizes(given["self"]))
    yield from _same(node, given["index"])
    for axis in range(len(sizes(node))):
        if axis != place and same_size(sizes(node)[axis], sizes(given["self"])[axis]):
            yield _tie(node, axis, given["self"], axis)


def _indexed(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    """Axes behind one index at the front; the chosen axis itself is tied by its chooser."""
    source, indices = given["self"], given["indices"]
    if len(indices) != 1 or not isinstance(indices[0], fx.Node):
        return
    shift = len(sizes(indices[0])) - 1
    for axis in range(1, len(sizes(source))):
        yield _tie(node, axis + shift, source, axis)


def _linear(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    rank = len(sizes(node))
    for axis in range(rank - 1):
        yield _tie(node, axis, given["input"], axis)
    yield _tie(node, rank - 1, given["weight"], 0)
    yield _tie(given["input"], rank - 1, given["weight"], 1)
    if given["bias"] is not None:
        yield _tie(node, rank - 1, given["bias"], 0)


def _matmul(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    names = [name for name in ("self", "other", "mat1", "mat2") if name in given]
    a, b = (given[name] for name in names[-2:])
    left, right, rank = len(sizes(a)), len(sizes(b)), len(sizes(node))
    if min(left, right) < 2:
        return
    yield _tie(node, rank - 2, a, left - 2)
    yield _tie(node, rank - 1, b, right - 1)
    yield _tie(a, left - 1, b, right - 2)
    for value, own in ((a, left), (b, right)):
        for axis in range(own - 2):
            if same_size(sizes(value)[axis], sizes(node)[axis + rank - own]):
                yield _tie(node, axis + rank - own, value, axis)
    if "mat1" in given:
        bias = given["self"]
        yield _tie(node, rank - 1, bias, len(sizes(bias)) - 1)


def _scatter(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    return _same(node, given["self"])


def _one_hot(node: Node, given: dict[str, Any]) -> Iterator[Tie]:
    return _same(node, given["self"])


_HANDLERS: dict[Any, Callable[[Node, dict[str, Any]], Iterator[Tie]]] = {
    **dict.fromkeys(
        (
            _ATEN.masked_fill.Scalar,
            _ATEN.masked_fill.Tensor,
            _ATEN.where.ScalarOther,
            _ATEN.where.ScalarSelf,
            _ATEN._to_copy.default,
            _ATEN.expand.default,
            _ATEN.detach.default,
        ),
        _pointwise,
    ),
    **dict.fromkeys(
        (
            _ATEN.softmax.int,
            _ATEN._softmax.default,
            _ATEN.log_softmax.int,
            _ATEN.zeros_like.default,
            _ATEN.ones_like.default,
            _ATEN.full_like.default,
        ),
        _like_self,
    ),
    **dict.fromkeys((_ATEN.reshape.default, _ATEN.view.default, _ATEN._unsafe_view.default), _view),
    **dict.fromkeys(
        (
            _ATEN.zeros.default,
            _ATEN.ones.default,
            _ATEN.full.default,
            _ATEN.new_zeros.default,
            _ATEN.new_full.default,
            _ATEN.sym_size.int,
        ),
        _made,
    ),
    **dict.fromkeys(
        (_ATEN.sum.dim_IntList, _ATEN.sum.default, _ATEN.amax.default, _ATEN.logsumexp.default),
        _reduced,
    ),
    **dict.fromkeys((_ATEN.scatter.value, _ATEN.scatter.src, _ATEN.scatter_add.default), _scatter),
    **dict.fromkeys(
        (_ATEN.matmul.default, _ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default), _matmul
    ),
    _ATEN.unsqueeze.default: _unsqueeze,
    _ATEN.squeeze.dim: _squeeze,
    _ATEN.transpose.int: _transpose,
    _ATEN.t.default: _transpose,
    _ATEN.permute.default: _permute,
    _ATEN.topk.default: _topk,
    _ATEN.gather.default: _gather,
    _ATEN.index.Tensor: _indexed,
    _ATEN.linear.default: _linear,
    _ATEN.one_hot.default: _one_hot,
}

__all__ = ["Axis", "NotFollowed", "Role", "Tie", "sizes", "ties"]
