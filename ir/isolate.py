"""A small piece of a program, cut out with the values that flow into it.

Two programs that differ by one rewrite give two pieces with the same inputs: the values on the
border of what differs. The pieces have the sizes of the recorded values, none is free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .edit import infer
from .interpret import run
from .program import Node, Program
from .text import value_names
from .verify import unchanged_nodes
from .weights import Weights


def shared_values(one: Program, other: Program) -> set[str]:
    """Names of the values that both programs compute alike, weights and all."""
    same = unchanged_nodes(one, other)
    shared: set[str] = set()
    for node in one.graph.nodes:
        if node.name not in same or any(r.name not in shared for r in node.all_input_nodes):
            continue
        if node.op == "get_attr":
            name = str(node.target)
            if one.weights.entry(name) is not other.weights.entry(name):
                continue
        shared.add(node.name)
    return shared


def border(program: Program, value: str, shared: set[str]) -> list[str]:
    """Names, in order, of the shared values that the rest of the way to `value` starts from.

    Weights belong to a piece, they are never on its border; nor are tuples.
    """
    inside = _inside(program, value, shared)
    names = {
        read.name
        for node in inside
        for read in node.all_input_nodes
        if read not in inside and read.op != "get_attr"
    }
    return [node.name for node in program.graph.nodes if node.name in names]


def _inside(program: Program, value: str, shared: set[str]) -> set[Node]:
    start = next(node for node in program.graph.nodes if node.name == value)
    inside: set[Node] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node in inside or node.op in ("placeholder", "get_attr"):
            continue
        inside.add(node)
        waiting += [r for r in node.all_input_nodes if not _may_border(r, shared)]
    return inside


def _may_border(node: Node, shared: set[str]) -> bool:
    value = node.meta.get("val")
    return node.name in shared and isinstance(value, (Tensor, torch.SymInt, int))


def input_names(program: Program, values: Sequence[str]) -> dict[str, str]:
    """Readable names, fit for a graph's input, of some values."""
    readable = {node.name: name for node, name in value_names(program.graph).items()}
    return {name: re.sub(r"\W", "_", readable.get(name, name)) for name in values}


def record(program: Program, names: Sequence[str], inputs: Sequence[Any]) -> dict[str, Any]:
    """The named values of a native run on flat inputs, each in memory of its own."""
    given = zip((node.name for node in program.inputs), inputs, strict=True)
    found = {name: value for name, value in given if name in names}

    def watch(node: Node, value: Any) -> None:
        if node.name in names:
            found[node.name] = value.clone() if isinstance(value, Tensor) else value

    run(program, inputs, watch=watch)
    return {name: found[name] for name in names}


def cut(
    program: Program,
    value: str,
    values: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
) -> Program:
    """The piece that computes `value` from recorded values, which are also its examples.

    Tensors become inputs, numbers constants. The result has one output, the value itself. names:
    what to call an input, by the name of the value.
    """
    names = names or {}
    start = next(node for node in program.graph.nodes if node.name == value)
    inside = _inside(program, value, set(values))
    graph = fx.Graph()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mapping: dict[Node, Any] = {}
    by_name = {node.name: node for node in program.graph.nodes}
    inputs = {name: given for name, given in values.items() if isinstance(given, Tensor)}
    for name, given in inputs.items():
        called = names.get(name, name)
        new = graph.create_node("placeholder", called, (), {}, called)
        with mode:
            new.meta["val"] = torch.empty(given.shape, dtype=given.dtype, device=given.device)
        new.meta["module"] = by_name[name].meta.get("module", "") if name in by_name else ""
        if name in by_name:
            mapping[by_name[name]] = new
    constants = {name: given for name, given in values.items() if name not in inputs}
    mapping |= {by_name[name]: given for name, given in constants.items() if name in by_name}
    weights = _copy_inside(program, inside | {start}, graph, mapping, mode)
    graph.output([mapping[start]])
    in_spec = pytree.tree_flatten((tuple(inputs.values()), {}))[1]
    out_spec = pytree.tree_flatten(0)[1]
    facts = program.facts & {"functional"}
    examples = tuple(inputs.values())
    return Program(graph, weights, in_spec, out_spec, facts, examples=examples)


def _copy_inside(
    program: Program,
    inside: set[Node],
    graph: fx.Graph,
    mapping: dict[Node, Any],
    mode: FakeTensorMode,
) -> Weights:
    weights = Weights()
    reads = {read for node in inside for read in node.all_input_nodes} | inside
    for node in program.graph.nodes:
        if node in mapping:
            continue
        if node.op == "get_attr" and node in reads:
            name = str(node.target)
            weights[name] = program.weights.entry(name)
            new = graph.create_node("get_attr", name, (), {}, node.name)
            with mode:
                shape = tuple(weights.shape(name))
                new.meta["val"] = torch.empty(shape, dtype=weights.dtype(name))
        elif node.op == "call_function" and node in inside:
            args = map_arg(node.args, lambda n: mapping[n])
            kwargs = map_arg(node.kwargs, lambda n: mapping[n])
            new = graph.create_node("call_function", node.target, args, kwargs, node.name)
            new.meta["val"] = infer(new, mode)
        else:
            continue
        new.meta["module"] = node.meta.get("module", "")
        if node.meta.get("stack_trace"):
            new.meta["stack_trace"] = node.meta["stack_trace"]
        mapping[node] = new
    return weights


__all__ = ["border", "cut", "input_names", "record", "shared_values"]
