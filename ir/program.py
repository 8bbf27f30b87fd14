"""A program: an FX graph of functional operations, its weights, its facts and its history.

The graph's placeholders are the user's inputs; a weight is a `get_attr` node whose target is the
weight's own name. Every node carries `meta["val"]` (a fake tensor: shape, dtype, symbolic sizes)
and `meta["module"]` (the path of the source module, "" at the root).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .errors import WrongInput
from .history import History
from .weights import Weights

Node = fx.Node


@dataclass(frozen=True)
class InputSpec:
    """One flat input: its name, and its shape with None where a size is free."""

    name: str
    dtype: torch.dtype | None
    shape: tuple[int | None, ...] | None
    constant: object = None

    @property
    def is_tensor(self) -> bool:
        return self.shape is not None


@dataclass
class Program:
    """An optimizable model; called like the model it came from."""

    graph: fx.Graph
    weights: Weights
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    facts: frozenset[str] = frozenset()
    history: History = field(default_factory=History)
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    examples: tuple[Any, ...] = ()

    @property
    def inputs(self) -> list[Node]:
        """The placeholder nodes, in order."""
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    @property
    def input_specs(self) -> list[InputSpec]:
        return [_input_spec(node) for node in self.inputs]

    @property
    def output(self) -> Node:
        return next(node for node in reversed(self.graph.nodes) if node.op == "output")

    @property
    def results(self) -> list[Any]:
        """The flat output values: nodes, or constants."""
        return list(self.output.args[0])  # type: ignore[arg-type]

    def parameter_count(self) -> int:
        """Logical floating-point elements of the weights, each tie once."""
        return self.weights.parameter_count()

    def nbytes(self) -> int:
        """Bytes of the weights as they are kept (packed where encoded), each tie once."""
        return self.weights.nbytes()

    def weight_nodes(self) -> list[Node]:
        return [node for node in self.graph.nodes if node.op == "get_attr"]

    def copy(self) -> Program:
        """A program whose graph and weight table can be edited without touching this one."""
        graph = fx.Graph()
        result = graph.graph_copy(self.graph, {})  # with a copy of each node's meta
        graph.output(result).meta = dict(self.output.meta)
        return Program(
            graph,
            self.weights.copy(),
            self.in_spec,
            self.out_spec,
            self.facts,
            self.history.copy(),
            dict(self.metadata),
            self.examples,
        )

    def flatten_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Check a call against the inputs and lay it out flat; raises WrongInput."""
        kwargs = _ordered_kwargs(self.in_spec, kwargs)
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise WrongInput(
                "the call does not have the structure that was captured",
                expected=_describe_call(self.in_spec, self.input_specs),
                found=f"{len(args)} positional, keywords {sorted(kwargs)}",
                fix="pass the same arguments, in the same form, as to planish.trace",
            )
        for value, wanted in zip(flat, self.input_specs, strict=True):
            _check_input(value, wanted)
        return flat

    def unflatten_outputs(self, flat: Iterable[Any]) -> Any:
        return pytree.tree_unflatten(list(flat), self.out_spec)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the reference interpreter; returns what the model returns."""
        from .interpret import run

        return self.unflatten_outputs(run(self, self.flatten_inputs(args, kwargs)))

    def __str__(self) -> str:
        from .text import program_text

        return program_text(self)

    def __repr__(self) -> str:
        nodes = len(self.graph.nodes)
        return f"Program({nodes} nodes, {self.parameter_count():,} parameters)"

    def to_module(self, weight: Callable[[str], Tensor] | None = None) -> fx.GraphModule:
        """The graph as a GraphModule over flat inputs, weights as its parameters and buffers."""
        from .graph_module import graph_module

        return graph_module(self, weight)


def _input_spec(node: Node) -> InputSpec:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
        return InputSpec(node.name, value.dtype, sizes)
    return InputSpec(node.name, None, None, value)


def _ordered_kwargs(in_spec: pytree.TreeSpec, kwargs: dict[str, Any]) -> dict[str, Any]:
    names = in_spec.child(1).context if in_spec.num_children == 2 else None
    if not names or set(names) != set(kwargs):
        return kwargs
    return {name: kwargs[name] for name in names}


def _describe_call(spec: pytree.TreeSpec, inputs: list[InputSpec]) -> str:
    named = ", ".join(f"{i.name}: {shape_text(i.shape)}" for i in inputs if i.is_tensor)
    return f"{spec.child(0).num_leaves} positional and keywords {spec.child(1).context}: {named}"


def shape_text(shape: Iterable[Any] | None) -> str:
    """[2, *, 64]: free sizes are stars."""
    if shape is None:
        return "a constant"
    return "[" + ", ".join(str(s) if isinstance(s, int) else "*" for s in shape) + "]"


def _check_input(value: Any, wanted: InputSpec) -> None:
    if not wanted.is_tensor:
        if not isinstance(wanted.constant, torch.SymInt) and value != wanted.constant:
            raise WrongInput(
                f"input {wanted.name} is a constant of the captured program",
                expected=repr(wanted.constant),
                found=repr(value),
                fix="trace the model again with the other value",
            )
        return
    if not isinstance(value, Tensor):
        raise WrongInput(
            f"input {wanted.name} is not a tensor",
            expected=f"{wanted.dtype} {shape_text(wanted.shape)}",
            found=type(value).__name__,
            fix="pass a torch.Tensor",
        )
    sizes = wanted.shape or ()
    fits = len(value.shape) == len(sizes) and all(
        want is None or want == have for want, have in zip(sizes, value.shape, strict=False)
    )
    if not fits or value.dtype != wanted.dtype:
        raise WrongInput(
            f"input {wanted.name} does not fit",
            expected=f"{wanted.dtype} {shape_text(sizes)}",
            found=f"{value.dtype} {shape_text(value.shape)}",
            fix="cast or reshape it, or trace the model with an example of this form",
        )
