"""Where an optimized graph gets its weights from: the caller's tensors, or copies kept fresh."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .backend_messages import FallbackWarning
from .codegen import torch_cpu
from .codegen.lower_gpu import lower_for_gpu, on_gpu
from .ir.capture_dynamo import DynamoCapture
from .ir.encoded import Encoded
from .ir.fingerprint import Fingerprint
from .ir.program import Program
from .passes.pipeline import Pipeline


@dataclass(frozen=True)
class LaidOut:
    """A program as a module that takes exactly the arguments of Dynamo's graph, in its order.

    baked: names of the buffers that hold weights which no argument holds (quantized ones).
    """

    module: fx.GraphModule
    baked: tuple[str, ...]

    def takes_weights_of(self, other: LaidOut) -> bool:
        """Copy the other's baked weights into this one's buffers; False if they do not fit."""
        if self.module.code != other.module.code or self.baked != other.baked:
            return False
        pairs = [(_tensor(self.module, n), _tensor(other.module, n)) for n in self.baked]
        if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
            return False
        with torch.no_grad():
            for mine, theirs in pairs:
                mine.copy_(theirs)
        return True


def lay_out(program: Program, captured: DynamoCapture, arguments: Sequence[Any]) -> LaidOut:
    """Lower the program and give it the arguments of Dynamo's graph.

    A weight that the passes left alone is read from its argument on every call; all others become
    buffers. The module returns the flat outputs.
    """
    lowered = _lower(program)
    live = _live(captured, arguments)
    graph = fx.Graph()
    given = [graph.placeholder(f"argument_{i}") for i in range(len(captured.weights))]
    user = iter([node for node, name in zip(given, captured.weights, strict=True) if name is None])
    root = torch.nn.Module()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in lowered.graph.nodes:
        if node.op == "placeholder":
            mapping[node] = next(user)
        elif node.op == "get_attr":
            tensor = _tensor(lowered, str(node.target))
            place = live.get(_place(tensor))
            if place is None:
                root.register_buffer(str(node.target), tensor)
                mapping[node] = graph.get_attr(str(node.target))
            else:
                mapping[node] = given[place]
        else:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    fixed = _constants(captured)
    baked = tuple(name for name, buffer in root.named_buffers() if _place(buffer) not in fixed)
    return LaidOut(fx.GraphModule(root, graph), baked)


def _lower(program: Program) -> fx.GraphModule:
    """Over flat inputs; weights in a number format run on packed kernels where there are some."""
    if on_gpu(program):
        program, _ = lower_for_gpu(program)
    encoded = any(isinstance(program.weights.entry(name), Encoded) for name in program.weights)
    return torch_cpu.lower(program) if encoded else program.to_module()


def _live(captured: DynamoCapture, arguments: Sequence[Any]) -> dict[tuple[Any, ...], int]:
    named = zip(captured.weights, arguments, strict=True)
    return {_place(value): i for i, (name, value) in enumerate(named) if name is not None}


def _constants(captured: DynamoCapture) -> set[tuple[Any, ...]]:
    """Tensors that the traced code made itself: nobody writes them."""
    weights = captured.program.weights
    return {_place(weights[name]) for name in weights if name not in captured.weights}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What makes two tensors the same memory seen the same way."""
    at = tensor.data_ptr() if tensor.numel() else id(tensor)
    return at, tensor.dtype, tuple(tensor.shape), tensor.stride()


def _tensor(module: fx.GraphModule, name: str) -> Tensor:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


class Refreshed:
    """A compiled graph with baked weights, which are made again when the model's are written."""

    def __init__(
        self,
        captured: DynamoCapture,
        recipe: Pipeline,
        made: LaidOut,
        compiled: Callable[..., Any],
        arguments: Sequence[Any],
    ) -> None:
        self.captured, self.recipe = captured, recipe
        self.made, self.compiled = made, compiled
        self.places = [i for i, name in enumerate(captured.weights) if name is not None]
        self.fingerprint = Fingerprint(self._weights(arguments))

    def _weights(self, arguments: Sequence[Any]) -> list[Tensor]:
        return [arguments[place] for place in self.places]

    def __call__(self, *arguments: Any) -> Any:
        if self.fingerprint.changed(self._weights(arguments)):
            self._refresh(arguments)
        return self.compiled(*arguments)

    def _refresh(self, arguments: Sequence[Any]) -> None:
        """Run the recipe on the new weights and take over what it made.

        Where another graph came out (a pass decided by the weights' values), that one runs from
        now on, operator by operator.
        """
        weights = self._weights(arguments)
        program = self.captured.program.copy()
        for place, tensor in zip(self.places, weights, strict=True):
            name = self.captured.weights[place]
            if name in program.weights:
                program.weights[str(name)] = tensor.detach()
        made = lay_out(self.recipe.run(program), self.captured, arguments)
        if not self.made.takes_weights_of(made):
            warnings.warn(
                "planish: the weights were written, and with the new ones the recipe gives "
                "another graph: it runs uncompiled; call torch._dynamo.reset() to compile it",
                FallbackWarning,
                stacklevel=2,
            )
            self.made, self.compiled = made, made.module
        self.fingerprint = Fingerprint(weights)
