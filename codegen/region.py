"""A region: operations that become one generated kernel, or the epilogue of a matmul.

In a lowered graph a region is the target of one node; called with tensors it computes them by the
operations it holds, so a lowered program still runs anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..ir.program import Node


@dataclass(eq=False)
class Region:
    """Operations with their inputs and results.

    graph: placeholders for `inputs` in order, the operations, an output of a tuple. members,
    inputs, results: nodes of the program that it was cut from. product: of an epilogue, the
    operator whose result is the first input.
    """

    graph: fx.Graph
    members: list[Node]
    inputs: list[Node]
    results: list[Node]
    name: str = "region"
    inner: dict[Node, Node] = field(default_factory=dict[Node, Node])

    @property
    def __name__(self) -> str:
        return self.name

    def __call__(self, *inputs: Any) -> Any:
        """Compute by torch: a tensor, or a tuple of them."""
        module = fx.GraphModule({}, self.graph)
        return fx.Interpreter(module).run(*inputs)

    @property
    def operations(self) -> list[fx.Node]:
        """The operations inside, in order."""
        return [node for node in self.graph.nodes if node.op == "call_function"]

    @property
    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]


def cut_region(members: Iterable[Node], name: str = "region") -> Region:
    """The region of members in graph order; what others read of it are its results."""
    members = list(members)
    inside = set(members)
    inputs = _inputs(members, inside)
    results = [n for n in members if any(user not in inside for user in n.users)]
    graph, copied = fx.Graph(), dict[Node, Node]()
    for place, node in enumerate(inputs):
        copied[node] = graph.placeholder(f"x{place}")
        copied[node].meta = dict(node.meta)
    for node in members:
        new = graph.node_copy(node, lambda read: copied[read])
        new.meta = dict(node.meta)
        copied[node] = new
    out = tuple(copied[node] for node in results)
    graph.output(out[0] if len(out) == 1 else out)
    return Region(graph, members, inputs, results, name, copied)


def _inputs(members: Sequence[Node], inside: set[Node]) -> list[Node]:
    found: dict[Node, None] = {}
    for node in members:
        for read in node.all_input_nodes:
            if read not in inside:
                found.setdefault(read)
    return list(found)


def put_region(region: Region, program_graph: fx.Graph) -> Node:
    """Replace the members in their graph by one call of the region; returns the call.

    Several results are taken from it by getitem.
    """
    last = region.members[-1]
    with program_graph.inserting_before(last):
        call = program_graph.call_function(region, tuple(region.inputs))
    values = [node.meta["val"] for node in region.results]
    call.meta["module"] = last.meta.get("module", "")
    call.meta["val"] = values[0] if len(values) == 1 else tuple(values)
    inside = set(region.members)
    with program_graph.inserting_after(call):
        for place, node in enumerate(region.results):
            new = call
            if len(values) > 1:
                new = program_graph.call_function(_getitem, (call, place))
                new.meta = dict(node.meta)
            node.replace_all_uses_with(
                new, delete_user_cb=lambda user, kept=call: user not in inside and user is not kept
            )
    for node in reversed(region.members):
        program_graph.erase_node(node)
    return call


def _getitem(values: tuple[Tensor, ...], place: int) -> Tensor:
    return values[place]


def reads(call: Node) -> list[Node]:
    """The tensors that a region's call reads."""
    found: list[Node] = []
    map_arg(call.args, found.append)
    return found


def nbytes(value: Tensor) -> Any:
    """Bytes of a value; symbolic where its sizes are."""
    return value.numel() * value.dtype.itemsize


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
