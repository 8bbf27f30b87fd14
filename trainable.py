"""A program's weights as parameters, and its run recorded for gradients.

What is trained is found in the data flow: matrices and tables that products and look-ups read, the
weights and biases of norms, products and convolutions. Other constants (rotary frequencies, masks,
scales) stay.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.utils.checkpoint import checkpoint

from .ir.errors import WrongInput
from .ir.pattern import bound_arguments
from .ir.program import Node, Program
from .ir.weight_roles import weight_roles

_ATEN = torch.ops.aten
# operator: its arguments that hold a weight or bias of one axis or more
_AFFINE: dict[Any, tuple[str, ...]] = {
    _ATEN.linear.default: ("weight", "bias"),
    _ATEN.addmm.default: ("self",),
    _ATEN.layer_norm.default: ("weight", "bias"),
    torch.ops.planish.rms_norm.default: ("weight",),
    _ATEN.conv1d.default: ("weight", "bias"),
    _ATEN.conv2d.default: ("weight", "bias"),
    _ATEN.convolution.default: ("weight", "bias"),
}


def trained_weights(program: Program, patterns: str = "*") -> list[str]:
    """Names of dense floating-point weights that training may change, in graph order.

    patterns: comma-separated, over the weights' own names. Raises WrongInput if nothing is left.
    """
    found = [role.name for role in weight_roles(program) if role.matmuls or role.tables]
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in _AFFINE:
            held = (bound_arguments(node)[name] for name in _AFFINE[node.target])
            found += [str(v.target) for v in held if isinstance(v, fx.Node) and v.op == "get_attr"]
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    names = [
        name
        for name in dict.fromkeys(program.weights.canonical(name) for name in found)
        if isinstance(program.weights.entry(name), Tensor)
        and program.weights.dtype(name).is_floating_point
        and any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)
    ]
    if not names:
        raise WrongInput(
            "the program has no weights that could be trained",
            expected=f"dense floating-point weights whose names match {patterns!r}",
            found=f"{len(found)} weights of products, tables and norms, none of them such",
            fix="distill before quantizing, or name other weights",
        )
    return names


class Trainable:
    """A program whose named weights are float32 parameters (float64 for such weights).

    stops: where the graph is parted for gradient checkpointing: only values that cross a stop are
    kept for the backward pass, the others are computed again (Chen et al. 2016). None: keep all.
    """

    def __init__(
        self, program: Program, names: Sequence[str], stops: Sequence[Node] | None = None
    ) -> None:
        self.program = program
        self.parameters: dict[str, Tensor] = {}
        for name in names:
            dense = program.weights[name].detach()
            wide = torch.promote_types(dense.dtype, torch.float32)
            self.parameters[name] = dense.to(wide).clone().requires_grad_()
        self._checkpointed = stops is not None
        self._segments = _segments(program, stops or ())
        self._read_later: list[set[Node]] = [set()]
        for segment in reversed(self._segments):
            self._read_later.insert(0, self._read_later[0] | set(_read(segment)))
        self._fixed: dict[str, Tensor] = {}

    def __call__(self, flat: Sequence[Any], watched: Sequence[Node] = ()) -> tuple[Any, list[Any]]:
        """The first result, and the watched values, with gradients."""
        wanted = {self.program.results[0], *watched}
        values: dict[Node, Any] = dict(zip(self.program.inputs, flat, strict=True))
        weights = {
            name: parameter.to(self.program.weights.dtype(name))
            for name, parameter in self.parameters.items()
        }
        for number, segment in enumerate(self._segments):
            later = self._read_later[number + 1] | wanted
            given = [node for node in _read(segment) if node in values]
            made = [node for node in segment if node in later]

            def call(*arguments: Any, segment: Any = segment, given: Any = given, made: Any = made):
                return self._run(segment, dict(zip(given, arguments, strict=True)), made, weights)

            arguments = [values[node] for node in given]
            results = (
                checkpoint(call, *arguments, use_reentrant=False, preserve_rng_state=False)
                if self._checkpointed
                else call(*arguments)
            )
            values |= dict(zip(made, results, strict=True))  # type: ignore[arg-type]
        return values[self.program.results[0]], [values[node] for node in watched]

    def _run(
        self,
        segment: Sequence[Node],
        values: dict[Node, Any],
        made: Sequence[Node],
        weights: dict[str, Tensor],
    ) -> tuple[Any, ...]:
        def read(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            if value.op != "get_attr":
                return values[value]
            name = self.program.weights.canonical(str(value.target))
            if name in weights:
                return weights[name]
            if name not in self._fixed:
                self._fixed[name] = self.program.weights[name].detach()
            return self._fixed[name]

        for node in segment:
            args, kwargs = map_aggregate(node.args, read), map_aggregate(node.kwargs, read)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return tuple(values[node] for node in made)

    def trained(self) -> Program:
        """A copy of the program with the parameters as they are now, in the weights' dtypes."""
        program = self.program.copy()
        for name, parameter in self.parameters.items():
            dtype = program.weights.dtype(name)
            program.weights[name] = parameter.detach().to(dtype).clone()
        return program


def _segments(program: Program, stops: Sequence[Node]) -> list[list[Node]]:
    """The calls of the graph, a new list after each stop."""
    last, segments = set(stops), list[list[Node]]([[]])
    for node in program.graph.nodes:
        if node.op == "call_function":
            segments[-1].append(node)
        if node in last:
            segments.append([])
    return [segment for segment in segments if segment]


def _read(segment: Sequence[Node]) -> list[Node]:
    """What a segment reads, once each, weights apart."""
    found = (read for node in segment for read in node.all_input_nodes)
    return [node for node in dict.fromkeys(found) if node.op != "get_attr"]


__all__ = ["Trainable", "trained_weights"]
