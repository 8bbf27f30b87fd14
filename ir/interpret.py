"""The reference run of a program: watched, streamed, in float64 on demand.

A weight is read when its first reader runs and a value is dropped after its last reader, so the
memory needed is that of the live values plus one layer's weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from .program import Node, Program

Watch = Callable[[Node, Any], None]


def run(
    program: Program,
    inputs: Sequence[Any],
    *,
    float64: bool = False,
    watch: Watch | None = None,
    weight: Callable[[str], Tensor] | None = None,
    gradients: bool = False,
) -> list[Any]:
    """Run on flat inputs; returns flat outputs.

    float64: every floating-point input, weight, cast and constant is widened to float64, which
    makes the run a yardstick for the rounding of the others. watch: called with every computed
    node and its value, in order. weight: reads a weight by name (default: the program's own).
    gradients: record them for what the watch marks with `requires_grad_`.
    """
    with torch.set_grad_enabled(gradients), _default_dtype(float64):
        return _Run(program, float64, watch, weight or program.weights.__getitem__).outputs(inputs)


@contextlib.contextmanager
def _default_dtype(float64: bool) -> Generator[None]:
    before = torch.get_default_dtype()
    if float64:
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def widen(value: Any) -> Any:
    """A floating tensor or dtype as float64; anything else unchanged."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


class _Run:
    def __init__(
        self,
        program: Program,
        float64: bool,
        watch: Watch | None,
        weight: Callable[[str], Tensor],
    ) -> None:
        self.graph = program.graph
        self.float64, self.watch, self.weight = float64, watch, weight
        self.values: dict[Node, Any] = {}
        self.last_reads = _last_reads(program.graph)

    def outputs(self, inputs: Sequence[Any]) -> list[Any]:
        given = iter(inputs)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                value = next(given)
                self.values[node] = widen(value) if self.float64 else value
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                return [self._read(value) for value in node.args[0]]
        raise AssertionError("a graph always ends in an output node")

    def _read(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value.op == "get_attr" and value not in self.values:
                stored = self.weight(str(value.target))
                self.values[value] = widen(stored) if self.float64 else stored
            return self.values[value]
        return widen(value) if self.float64 else value

    def _call(self, node: Node) -> None:
        if self.float64 and is_assertion(node):
            return
        args = map_aggregate(node.args, self._read)
        kwargs = map_aggregate(node.kwargs, self._read)
        result = node.target(*args, **kwargs)  # type: ignore[operator]
        self.values[node] = result
        if self.watch is not None:
            self.watch(node, result)
        for done in self.last_reads.get(node, ()):
            self.values.pop(done, None)


def is_assertion(node: Node) -> bool:
    """Whether the node only checks something at run time."""
    return node.op == "call_function" and "assert" in getattr(node.target, "__name__", "")


def _last_reads(graph: fx.Graph) -> dict[Node, list[Node]]:
    """For each node the values whose last reader it is (or which nobody reads)."""
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            last.setdefault(node, node)
        for read in node.all_input_nodes:
            last[read] = node
    done: dict[Node, list[Node]] = {}
    for value, reader in last.items():
        done.setdefault(reader, []).append(value)
    return done
