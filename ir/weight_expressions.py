"""Values that follow from weights alone: which they are, what they read, and what they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate, map_arg

from .edit import is_pure
from .interpret import is_assertion, widen
from .program import Node, Program


def constant_nodes(program: Program) -> set[Node]:
    """Weights, and nodes of fixed size that no input reaches."""
    constant: set[Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_function" and is_pure(node) and not is_assertion(node):
            value: Any = node.meta.get("val")
            fixed = not isinstance(value, Tensor) or all(isinstance(s, int) for s in value.shape)
            if fixed and all(read in constant for read in node.all_input_nodes):
                constant.add(node)
    return constant


def sources(node: Node) -> set[Node]:
    """The weights that a value is computed from, the value itself if it is one."""
    found: set[Node] = set()
    seen = {node}
    waiting = [node]
    while waiting:
        value = waiting.pop()
        if value.op == "get_attr":
            found.add(value)
        fresh = [read for read in value.all_input_nodes if read not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    return found


def evaluate(program: Program, node: Node, float64: bool = False) -> Tensor:
    """A constant value; with float64, computed as a float64 run of the program would."""
    values: dict[Node, Any] = {}

    def read(argument: Any) -> Any:
        return widen(argument) if float64 else argument

    def value(wanted: Node) -> Any:
        if wanted not in values:
            if wanted.op == "get_attr":
                values[wanted] = read(program.weights[str(wanted.target)])
            else:
                args = map_aggregate(map_arg(wanted.args, value), read)
                kwargs = map_aggregate(map_arg(wanted.kwargs, value), read)
                values[wanted] = wanted.target(*args, **kwargs)  # type: ignore[operator]
        return values[wanted]

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if float64 else before)
    try:
        with torch.no_grad():
            return value(node)
    finally:
        torch.set_default_dtype(before)
