"""Adapters beside a part of a packed product: query and value of one qkv product, for example.

Before: `%p = linear(%x, %W); %q = slice(%p, -1, a, b); %y = add(%q, linear(linear(%x, %A), %B))`.
After: %q, with B A added to the rows a to b of W. The other parts of %p stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..ir.edit import shape
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from .branch_matrix import Affine, merged, why_not_one
from .find_adapter_branch import Finder, Region

_ATEN = torch.ops.aten
_LINEAR = {_ATEN.linear.default: True, _ATEN.addmm.default: False}


@dataclass(frozen=True)
class Packed:
    """change: what is linear in x beside the part; product, part: the packed product and a slice.

    rows: first and last + 1 of the output channels that the part takes.
    """

    change: Region
    product: Node
    part: Node
    rows: tuple[int, int]

    @property
    def weight(self) -> Node:
        given = bound_arguments(self.product)
        return given["weight"] if _LINEAR[self.product.target] else given["mat2"]  # type: ignore[index]

    @property
    def bias(self) -> Node | None:
        given = bound_arguments(self.product)
        return given["bias"] if _LINEAR[self.product.target] else given["self"]  # type: ignore[index]


def find_packed(finder: Finder) -> list[Packed]:
    """Sums of a part of a packed product and branches that are linear in what it reads."""
    found: list[Packed] = []
    for node, step in finder.steps.items():
        if step.kind != "sum" or len(step.reads) != 2 or step.bias:
            continue
        for part, change in (step.reads, step.reads[::-1]):
            packed = _read(finder, node, part, change)
            if packed is not None:
                found.append(packed)
                break
    return found


def _read(
    finder: Finder, root: Node, part: tuple[Node, float], change: tuple[Node, float]
) -> Packed | None:
    node = part[0]
    if node.target is not _ATEN.slice.Tensor or part[1] != 1 or len(node.users) != 1:
        return None
    rows = _rows(node)
    product = node.args[0]
    while product in finder.steps and finder.steps[product].kind == "layout":  # type: ignore[index]
        product = finder.steps[product].reads[0][0]  # type: ignore[index]
    if rows is None or not isinstance(product, fx.Node) or product.target not in _LINEAR:
        return None
    step = finder.steps.get(product)
    below = finder.common([change[0]])
    if step is None or below is None or step.weight.op != "get_attr":
        return None
    source = step.reads[0][0]
    while source is not below[0] and source in finder.steps and _is_layout(finder, source):
        source = finder.steps[source].reads[0][0]
    if source is not below[0]:
        return None
    ordered = dict(sorted(below[1].items(), key=lambda pair: finder.order[pair[0]]))
    region = Region(root, (change,), source, ordered, sums=frozenset({root}))
    return Packed(region, product, node, rows)


def _is_layout(finder: Finder, node: Node) -> bool:
    return finder.steps[node].kind == "layout"


def _rows(node: Node) -> tuple[int, int] | None:
    """The channels that a slice of the last axis takes."""
    given = bound_arguments(node)
    sizes = shape(given["self"])
    last, axis = sizes[-1], given["dim"] % len(sizes)
    if axis != len(sizes) - 1 or given["step"] != 1 or not isinstance(last, int):
        return None
    start, end = given["start"] or 0, last if given["end"] is None else given["end"]
    if not isinstance(start, int) or not isinstance(end, int):
        return None
    start, end = (min(v + last if v < 0 else v, last) for v in (start, end))
    return (start, end) if start < end else None


def why_not_packed(packed: Packed, program: Program) -> str | None:
    """The sentence why the change cannot go into the packed weight, or None."""
    weight, bias = packed.weight, packed.bias
    kept = getattr(program.weights.entry(str(weight.target)), "format", None)
    if kept is not None:
        return f"{weight.target} is kept as {kept.name}: merge adapters before quantizing"
    for node in (weight, *([bias] if bias is not None else [])):
        if node.op != "get_attr" or len(node.users) > 1:
            return f"%{node.name} is read elsewhere too, and stays what it is"
    for other in _readers(packed.product):
        rows = (
            _rows(other) if other.target is _ATEN.slice.Tensor else (0, shape(packed.product)[-1])
        )
        if other is packed.part:
            continue
        if rows is None or max(rows[0], packed.rows[0]) < min(rows[1], packed.rows[1]):
            return f"%{other.name} reads the same channels of %{packed.product.name}"
    if bias is None and _has_bias(packed.change):
        return f"%{packed.product.name} has no bias and its adapter has one"
    return why_not_one(packed.change)


def _readers(product: Node) -> Iterable[Node]:
    """Readers of a product, those of its regroupings in their place."""
    for user in product.users:
        if user.target is _ATEN.reshape.default and shape(user)[-1] == shape(product)[-1]:
            yield from _readers(user)
        else:
            yield user


def _has_bias(region: Region) -> bool:
    return any(step.bias for step in region.steps.values())


def change_rows(program: Program, packed: Packed) -> list[tuple[str, Any]]:
    """The packed weight and, where the change has one, its bias: (name, new tensor) of each."""
    total: Affine = merged(program, packed.change)
    assert total.matrix is not None
    first, last = packed.rows
    name = str(packed.weight.target)
    weight = program.weights[name]
    wide = weight.double().clone()
    if _LINEAR[packed.product.target]:  # type: ignore[index]
        wide[first:last] += total.matrix.T
    else:
        wide[:, first:last] += total.matrix
    made = [(name, wide.to(weight.dtype))]
    if total.bias is not None and packed.bias is not None:
        bias = program.weights[str(packed.bias.target)]
        longer = bias.double().clone()
        longer[first:last] += total.bias
        made.append((str(packed.bias.target), longer.to(bias.dtype)))
    return made
