"""Values that follow from sizes and weights alone, and what they are at sizes of our choice.

A causal mask is one: it is made of counted positions and no input's contents reach it. Such a
value can be computed at any length, so a claim about it is decided by trying.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from .edit import is_pure
from .program import Node, Program

Sizes = Mapping[Any, int]
"""A number for each free size (by its symbol)."""

_UNBOUNDED = 2**31


class Positional:
    """The positional values of one program (as it is when this is made).

    inputs: those whose contents count as known too (a padding mask); `evaluate` needs them given.
    """

    def __init__(self, program: Program, inputs: Collection[Node] = ()) -> None:
        self.program = program
        self.inputs = frozenset(inputs)
        self.nodes: set[Node] = set()
        for node in program.graph.nodes:
            if self._follows(node):
                self.nodes.add(node)

    def _follows(self, node: Node) -> bool:
        if is_size(node.meta.get("val")) or node.op == "get_attr" or node in self.inputs:
            return True
        if node.op != "call_function" or not is_pure(node):
            return False
        return all(read in self.nodes for read in contents_read(node))

    def evaluate(self, node: Node, sizes: Sizes, given: dict[Node, Any]) -> Any:
        """The value of a node at these sizes.

        given: values of nodes that are not to be computed (or that cannot be: inputs); computed
        values are added to it. Raises RuntimeError or IndexError where the graph itself cannot
        run at these sizes, LookupError at a value that is not positional.
        """
        if node in given:
            return given[node]
        value = node.meta.get("val")
        if is_size(value):
            result: Any = size_at(value, sizes)
        elif node.op == "get_attr":
            result = self.program.weights[str(node.target)]
        elif node.op != "call_function":
            raise LookupError(f"%{node.name} is an input")
        else:
            result = self._call(node, sizes, given)
        given[node] = result
        return result

    def _call(self, node: Node, sizes: Sizes, given: dict[Node, Any]) -> Any:
        contents = set(contents_read(node))

        def read(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            if value not in contents and value not in given:
                return blank(value, sizes)
            return self.evaluate(value, sizes, given)

        args, kwargs = map_aggregate(node.args, read), map_aggregate(node.kwargs, read)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def is_size(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def size_at(size: Any, sizes: Sizes) -> int:
    """A size, free or known, at these sizes."""
    return int(size.node.expr.subs(sizes)) if isinstance(size, torch.SymInt) else int(size)


def free_symbols(size: Any) -> set[Any]:
    """The symbols that a size is made of; none if it is known."""
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def blank(node: Node, sizes: Sizes, fill: Any = 0) -> Tensor:
    """A tensor of the shape and dtype that the node has at these sizes."""
    value = node.meta["val"]
    return torch.full([size_at(s, sizes) for s in value.shape], fill, dtype=value.dtype)


def contents_read(node: Node) -> list[Node]:
    """The nodes whose contents (not only whose form) the call reads."""
    name = getattr(getattr(node.target, "_schema", None), "name", "").split("::")[-1]
    form_only = node.args[0] if name.endswith("_like") or name.startswith("new_") else None
    return [read for read in node.all_input_nodes if read is not form_only]


def free_sizes(program: Program) -> dict[Any, tuple[int, int, bool]]:
    """For each free size of the inputs: least, greatest, and whether it is ever more than axis 0.

    A size that only leads an input counts examples (a batch); any other counts positions.
    """
    found: dict[Any, tuple[int, int, bool]] = {}
    for node in program.inputs:
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt):
                for symbol in free_symbols(size):
                    least, greatest = _bounds(size, symbol)
                    inner = axis > 0 or found.get(symbol, (0, 0, False))[2]
                    found[symbol] = (least, greatest, inner)
    return found


def _bounds(size: torch.SymInt, symbol: Any) -> tuple[int, int]:
    bounds = size.node.shape_env.var_to_range.get(symbol)
    if bounds is None:
        return 2, _UNBOUNDED
    least = int(bounds.lower) if bounds.lower > 2 else 2
    return least, int(bounds.upper) if bounds.upper < _UNBOUNDED else _UNBOUNDED
