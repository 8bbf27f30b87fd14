"""Quantization-aware training: a program as a module whose forward pass sees quantized numbers.

Before training a weight w is a parameter; in the forward pass its readers see decode(encode(w)),
in the backward pass the gradient of that goes to w as it is (the straight-through estimator,
Bengio et al. 2013; for signs Courbariaux et al. 2016). What `quantize_activations` put into a
program is passed through likewise. The training loop is the user's own:

    module = FakeQuantized(program, QuantizeWeights(bits=3, group_size=32))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    for batch in batches:
        loss_of(module(*batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    program = module.quantized()
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ir.edit import Editor
from ..ir.encoded import Format
from ..ir.program import Program
from ..ir.rewrite import Journal
from .contract import Context
from .quantize_weights import QuantizeWeights


class _Rounded(torch.autograd.Function):
    """Forward: the nearest weight that the format can hold. Backward: nothing changes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, fmt: Format, axis: int) -> Tensor:
        return fmt.encode(weight, axis).decode()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


class _Replaced(torch.autograd.Function):
    """Forward: the rounded value. Backward: its gradient is that of the value before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def fake_quantize(weight: Tensor, fmt: Format, axis: int = -1) -> Tensor:
    """`weight` [..., out, in] rounded to a format along `axis`, with straight-through gradients."""
    return _Rounded.apply(weight, fmt, axis)  # type: ignore[return-value]


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, whose gradient goes to `value`, a tensor of the same shape and dtype."""
    return _Replaced.apply(value, rounded)  # type: ignore[return-value]


class FakeQuantized(nn.Module):
    """A program that can be trained on the numbers it will have when quantized.

    quantizer: says which weights are rounded to which format; these are the parameters. others:
    comma-separated patterns of weights that are trained as they are ("*norm*, *.bias"). Parameters
    are float32 (float64 for such weights), whatever the weight's dtype; it is called like the
    program. Calls of quantized activations in the program get straight-through gradients.
    """

    def __init__(self, program: Program, quantizer: QuantizeWeights, others: str = "") -> None:
        super().__init__()
        self.program, self.quantizer = program.copy(), quantizer
        journal = Journal(program)
        planned = quantizer.planned(self.program, journal)
        self.formats: dict[str, tuple[Format, int]] = {}
        for role, fmt in planned:
            assert role.axis is not None
            self.formats[role.name] = (fmt, role.axis)
        for name in self.program.weights:
            if name in self.formats or _named(self.program, name, others):
                dense = self.program.weights[name].detach()
                wide = torch.promote_types(dense.dtype, torch.float32)
                self.register_parameter(_attribute(name), nn.Parameter(dense.to(wide).clone()))
        self.graph = _with_gradients(self.program).to_module()
        self._places: dict[str, list[str]] = {}
        for attribute, name in self.graph.meta["weight_names"].items():
            self._places.setdefault(self.program.weights.canonical(name), []).append(attribute)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.program.flatten_inputs(args, kwargs)
        seen: dict[str, Tensor] = {}
        for name, weight in self.trained_weights().items():
            if name in self.formats:
                weight = fake_quantize(weight, *self.formats[name])
            seen |= dict.fromkeys(self._places.get(name, ()), weight)
        results = torch.func.functional_call(self.graph, seen, tuple(flat))
        return self.program.unflatten_outputs(results)

    def trained_weights(self) -> Mapping[str, Tensor]:
        """The parameters by the weights' own names, in the weights' dtypes."""
        found: dict[str, Tensor] = {}
        for name in self.program.weights:
            parameter = self._parameters.get(_attribute(name))
            if parameter is not None:
                found[name] = parameter.to(self.program.weights.dtype(name))
        return found

    def trained(self) -> Program:
        """The program with the trained weights, not quantized."""
        program = self.program.copy()
        for name, weight in self.trained_weights().items():
            program.weights[name] = weight.detach().clone()
        return program

    def quantized(self) -> Program:
        """The program with the trained weights in their formats: it computes what training saw."""
        program = self.trained()
        self.quantizer.run(program, Context(Journal(program)))
        return program


def _attribute(name: str) -> str:
    return name.replace(".", "__")


def _named(program: Program, name: str, patterns: str) -> bool:
    if not program.weights.dtype(name).is_floating_point:
        return False
    return any(fnmatch.fnmatchcase(name, p.strip()) for p in patterns.split(",") if p.strip())


def _with_gradients(program: Program) -> Program:
    """A copy in which what is rounded passes its gradient on to what it was rounded from."""
    program = program.copy()
    editor = Editor(program)
    ops = torch.ops.planish
    for node in list(program.graph.nodes):
        source = None
        if node.target is ops.dequantize.default and node.args[0].target is ops.quantize.default:
            source = node.args[0].args[0]
        elif node.target is ops.round_regular.default:
            source = node.args[0]
        if source is None:
            continue
        with program.graph.inserting_after(node):
            passed = program.graph.call_function(straight_through, (source, node))
        passed.meta = dict(node.meta)
        node.replace_all_uses_with(passed, delete_user_cb=lambda user, own=passed: user is not own)
    editor.sweep()
    return program


__all__ = ["FakeQuantized", "fake_quantize", "straight_through"]
