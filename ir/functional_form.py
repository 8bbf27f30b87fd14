"""The functional form of an exported graph, each kind of call translated once.

`ExportedProgram.run_decompositions({})` traces a whole model again, which takes longer than the
export and grows faster than the number of layers. What it does to one call depends only on the
operator and the classes of its arguments, as long as nothing is written in place. So one small
program, with one call of every kind, goes through it, and what became of each call is put in the
place of all calls of its kind. A graph that writes in place, or in which sizes are computed on
the way, is left to `run_decompositions`.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from .edit import fake_mode
from .infer_values import Inference

Node = fx.Node
_LOG = logging.getLogger(__name__)
_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")


class _NotPlain(Exception):
    """The graph holds something that is not translated call by call."""


def functional_form(exported: ExportedProgram) -> fx.Graph | None:
    """The graph in functional form, or None where only `run_decompositions` can tell it.

    The placeholders keep their names, so the signature of the exported program still fits.
    """
    try:
        kinds = _Kinds(exported.graph)
        kinds.translate(exported)
        return kinds.rebuilt(exported.graph)
    except _NotPlain:
        return None
    except Exception as error:  # whatever it is, the long way gives the right graph or error
        _LOG.warning("this model is captured by torch's slower way: %r", error)
        return None


@dataclass
class _Call:
    """One call that stands for its kind, and what it became.

    arguments: placeholders of the small program, in the order of the call's tensors. piece: the
    new nodes in order; results: the values that its result became.
    """

    node: Node
    arguments: list[Node] = field(default_factory=list[Node])
    piece: list[Node] = field(default_factory=list[Node])
    results: list[Node] = field(default_factory=list[Node])


class _Kinds:
    """The kinds of calls of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._inference = Inference.of(fake_mode(graph))
        self._calls: dict[Hashable, _Call] = {}
        self._kind_of: dict[Node, Hashable] = {}
        self._sizes: dict[Any, Node] = {}  # expression -> placeholder of the small program
        for node in graph.nodes:
            if node.op == "call_function":
                if free_unbacked_symbols(node.meta.get("val")):
                    raise _NotPlain  # every trace names them anew
                if not _is_scalar(node):
                    self._add(node)
            elif node.op not in ("placeholder", "output"):
                raise _NotPlain

    def _add(self, node: Node) -> None:
        _check_plain(node)
        kind = self._inference.kind(node)
        if kind is None:
            raise _NotPlain
        self._kind_of[node] = kind
        self._calls.setdefault(kind, _Call(node))

    def translate(self, exported: ExportedProgram) -> None:
        """Send one call of every kind through `run_decompositions`, and read what each became."""
        graph, outputs = self._small_graph()
        inputs = graph.find_nodes(op="placeholder")
        small = _exported(graph, inputs, [node for _, node in outputs], exported)
        functional = small.run_decompositions({}).graph
        placed = dict(zip(inputs, functional.find_nodes(op="placeholder"), strict=True))
        sizes = {placed[node] for node in self._sizes.values()}
        results: list[Node] = list(functional.output_node().args[0])  # type: ignore[arg-type]
        owners: dict[Node, _Call] = {}
        for call in self._calls.values():
            call.arguments = [placed[node] for node in call.arguments]
            owners.update(dict.fromkeys(call.arguments, call))
        for (call, _), result in zip(outputs, results, strict=True):
            call.results.append(result)
            if owners.setdefault(result, call) is not call:
                raise _NotPlain
        made = [node for node in functional.nodes if node.op == "call_function"]
        for node in reversed(made):
            owners.setdefault(node, _owner(node, owners))
        for node in made:
            call = owners[node]
            if any(owners.get(r) is not call and r not in sizes for r in node.all_input_nodes):
                raise _NotPlain
            call.piece.append(node)
        self._sizes = {expression: placed[node] for expression, node in self._sizes.items()}

    def _small_graph(self) -> tuple[fx.Graph, list[tuple[_Call, Node]]]:
        """A graph of one call of every kind, each on inputs of its own; its tensor results."""
        graph = fx.Graph()
        copied = [
            (call, *self._inputs(graph, call, (call.node.args, call.node.kwargs)))
            for call in self._calls.values()
        ]
        outputs: list[tuple[_Call, Node]] = []
        for call, args, kwargs in copied:
            target: Any = call.node.target
            made = graph.call_function(target, args, kwargs)
            made.meta = {name: call.node.meta[name] for name in _META if name in call.node.meta}
            made.meta["val"] = call.node.meta["val"]
            outputs += [(call, node) for node in _tensors(graph, made)]
        graph.output(tuple(node for _, node in outputs)).meta = {}
        return graph, outputs

    def _inputs(self, graph: fx.Graph, call: _Call, arguments: Any) -> Any:
        def place(node: Node) -> Node:
            value = node.meta["val"]
            if isinstance(value, torch.SymInt) and value.node.expr in self._sizes:
                return self._sizes[value.node.expr]
            made = graph.placeholder(f"input_{len(graph.nodes)}")
            made.meta = {"val": value}
            if isinstance(value, torch.SymInt):
                self._sizes[value.node.expr] = made
            else:
                call.arguments.append(made)
            return made

        return map_arg(arguments, place)

    def rebuilt(self, old: fx.Graph) -> fx.Graph:
        """The whole graph, with what each call became in its place."""
        graph = fx.Graph()
        values: dict[Node, Any] = {}
        sizes: dict[Any, Node] = {}
        for node in old.nodes:
            if node in self._kind_of:
                values[node] = self._put(graph, node, values, sizes)
            elif node.target is operator.getitem and isinstance(values[node.args[0]], list):
                values[node] = values[node.args[0]][node.args[1]]
            elif isinstance(node.meta.get("val"), torch.SymInt):
                expression = node.meta["val"].node.expr
                if expression not in sizes:
                    sizes[expression] = graph.node_copy(node, lambda n: values[n])
                values[node] = sizes[expression]
            else:
                values[node] = graph.node_copy(node, lambda n: values[n])
        graph.eliminate_dead_code()
        return graph

    def _put(
        self, graph: fx.Graph, node: Node, values: Mapping[Node, Any], sizes: Mapping[Any, Node]
    ) -> Any:
        """The piece of a call's kind on the call's own arguments; its value, or its values."""
        call = self._calls[self._kind_of[node]]
        own = [values[n] for n in _tensor_arguments(node)]
        mapping: dict[Node, Node] = dict(zip(call.arguments, own, strict=True))
        mapping |= {small: sizes[e] for e, small in self._sizes.items() if e in sizes}
        for part in call.piece:
            made = graph.node_copy(part, lambda n: mapping[n])
            made.meta = {name: node.meta[name] for name in _META if name in node.meta}
            made.meta["val"] = part.meta.get("val")
            mapping[part] = made
        results = [mapping[result] for result in call.results]
        if isinstance(node.meta.get("val"), Tensor):
            (only,) = results
            return only
        return results


def _is_scalar(node: Node) -> bool:
    """Whether the node computes a size, or takes one result of several."""
    if node.target is operator.getitem:
        return True
    return isinstance(node.meta.get("val"), torch.SymInt)


def _check_plain(node: Node) -> None:
    """Raise _NotPlain unless a call's functional form depends on the call alone."""
    target, value = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        raise _NotPlain
    parts: Any = value if isinstance(value, (list, tuple)) else [value]
    tensors = all(isinstance(part, Tensor) for part in parts)
    if not tensors and not (value is None and _tensor_arguments(node)):
        raise _NotPlain


def _tensor_arguments(node: Node) -> list[Node]:
    """The tensors that a call reads, once for each place in which it reads one."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return [read for read in found if not isinstance(read.meta["val"], torch.SymInt)]


def _tensors(graph: fx.Graph, node: Node) -> Iterator[Node]:
    value = node.meta["val"]
    if isinstance(value, Tensor):
        yield node
    elif value is not None:
        for place, part in enumerate(value):
            taken = graph.call_function(operator.getitem, (node, place))
            taken.meta = {**node.meta, "val": part}
            yield taken


def _owner(node: Node, owners: dict[Node, _Call]) -> _Call:
    """The call that a new node belongs to: by its result, its readers, or what it reads."""
    if not isinstance(node.meta.get("val"), (Tensor, list, tuple, type(None))):
        raise _NotPlain  # a size that is computed on the way
    for known in (node, *node.users, *node.all_input_nodes):
        if known in owners:
            return owners[known]
    raise _NotPlain


def _exported(
    graph: fx.Graph, inputs: list[Node], outputs: list[Node], like: ExportedProgram
) -> ExportedProgram:
    """A graph of inputs and calls as an exported program."""
    from torch.export import ModuleCallEntry, ModuleCallSignature

    def told(node: Node) -> SymIntArgument | TensorArgument:
        size = isinstance(node.meta["val"], torch.SymInt)
        return (SymIntArgument if size else TensorArgument)(name=node.name)

    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, told(node), None) for node in inputs],
        [OutputSpec(OutputKind.USER_OUTPUT, told(node), None) for node in outputs],
    )
    in_spec = pytree.tree_flatten((tuple(range(len(inputs))), {}))[1]
    out_spec = pytree.tree_flatten(tuple(range(len(outputs))))[1]
    entry = ModuleCallEntry("", ModuleCallSignature([], [], in_spec, out_spec))
    root, ranges = fx.GraphModule({}, graph), dict(like.range_constraints)
    return ExportedProgram(root, graph, signature, {}, ranges, [entry])
