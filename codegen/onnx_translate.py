"""A graph's nodes become ONNX nodes, one by one; what has no translation is decomposed first."""

from __future__ import annotations

import contextlib
import operator
import warnings
from collections.abc import Generator, Iterable
from typing import Any

import onnx_ir as oir
import torch
from torch import fx
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ..ir.interpret import is_assertion
from ..ir.pattern import bound_arguments
from ..ir.program import Node
from .onnx_builder import Builder, Value
from .onnx_call import Call, read, unsupported
from .onnx_sizes import SIZES, bind_symbols
from .onnx_table import translation


def live_nodes(graph: fx.Graph, results: Iterable[Any]) -> list[Node]:
    """The computed nodes that the results need, in order; sizes are made where they are read."""
    wanted: set[Node] = set()
    pending = [value for value in results if isinstance(value, fx.Node)]
    while pending:
        node = pending.pop()
        if node not in wanted and not _is_size(node):
            wanted.add(node)
            pending.extend(node.all_input_nodes)
    calls = (node for node in graph.nodes if node.op == "call_function")
    return [node for node in calls if node in wanted and not is_assertion(node)]


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (*SIZES, int, float))


def translate_program(b: Builder, results: Iterable[Any]) -> None:
    """Emit all that the results need; what a program node computes gets that node's name."""
    for node in live_nodes(b.program.graph, results):
        b.base, b.module = b.names[node], node.meta.get("module", "")
        before = len(b.nodes)
        translate_node(b, node)
        _name_results(b, b.values[node], set(b.nodes[before:]))


def _name_results(b: Builder, result: Any, emitted: set[oir.Node]) -> None:
    for place, value in enumerate(result if isinstance(result, list) else [result]):
        if isinstance(value, Value) and value.producer() in emitted:
            value.name = b.unique(b.base if place == 0 else f"{b.base}:{place}")


def translate_node(b: Builder, node: Node, depth: int = 0) -> None:
    """Emit a node and note its value in `b.values`; raises UnsupportedByTarget."""
    if node.target is operator.getitem:
        b.values[node] = b.values[node.args[0]][node.args[1]]  # type: ignore[index]
        return
    found = translation(node)
    result = found(Call(b, node, bound_arguments(node))) if found else None
    if result is None:
        result = _decomposed(b, node, depth)
    b.values[node] = result
    _describe(node, result, b)


def _describe(node: Node, result: Any, b: Builder) -> None:
    """Give the results the shapes that the capture knows, and remember where sizes can be read."""
    values = result if isinstance(result, list) else [result]
    metas = node.meta["val"] if isinstance(result, list) else [node.meta["val"]]
    for value, meta in zip(values, metas, strict=False):
        if isinstance(value, Value) and isinstance(meta, torch.Tensor):
            bind_symbols(b, value, meta.shape)


def _decomposed(b: Builder, node: Node, depth: int) -> Any:
    """Trace the node's own definition on its fake values and translate what comes out."""
    graph = _definition(node) if depth < 4 else None
    if graph is None:
        raise unsupported(node, "neither a translation nor a decomposition")
    placeholders = [inner for inner in graph.nodes if inner.op == "placeholder"]
    for inner, outer in zip(placeholders, node.all_input_nodes, strict=True):
        inner.meta["val"] = outer.meta["val"]
        if not _is_size(outer):
            b.values[inner] = read(b, outer)
    output = next(inner for inner in graph.nodes if inner.op == "output")
    results: Any = output.args[0]
    for inner in live_nodes(graph, output.all_input_nodes):
        inner.meta["module"] = node.meta.get("module", "")
        translate_node(b, inner, depth + 1)
    if isinstance(results, (list, tuple)):
        return [b.values[value] if isinstance(value, fx.Node) else None for value in results]
    return b.values[results]


@contextlib.contextmanager
def _free_sizes(node: Node, fakes: list[Any]) -> Generator[None]:
    """Refuse a decomposition that works for one size only, and take back what it assumed."""
    envs = [fake.fake_mode.shape_env for fake in fakes if isinstance(fake, FakeTensor)]
    env = next((env for env in envs if env is not None), None)
    before = {} if env is None else dict(env.replacements)
    yield
    if env is None or env.replacements == before:
        return
    fixed = {str(s): str(e) for s, e in env.replacements.items() if s not in before}
    env.replacements.clear()
    env.replacements.update(before)
    env._replacements_version_counter += 1  # sizes keep their expressions until this changes
    env._update_version_counter()
    raise unsupported(node, f"its decomposition fixes free sizes: {fixed}")


def _definition(node: Node) -> fx.Graph | None:
    """The node in smaller operations, or None where it has none."""
    target: Any = node.target
    outer = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(outer, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), lambda read: given[read])
        return target(*args, **kwargs)

    fakes = [read.meta["val"] for read in outer]
    table: Any = {op: rule for op, rule in core_aten_decompositions().items() if op is target}
    with warnings.catch_warnings(), torch.no_grad(), _free_sizes(node, fakes):
        warnings.simplefilter("ignore")
        traced = make_fx(call, decomposition_table=table, _allow_non_fake_inputs=True)(*fakes)
    calls = [inner for inner in traced.graph.nodes if inner.op == "call_function"]
    if any(inner.target is target for inner in calls) or any(
        inner.op == "get_attr" for inner in traced.graph.nodes
    ):
        return None
    return traced.graph
