"""The one matrix of a region of linear branches: y = x M + c, computed in float64.

M is [in, out] (with leading axes where the products have them), or a kernel [out, in, ...] of a
convolution. Each branch is a product of its factors; what is merged is rounded once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.program import Node, Program
from ..ir.weight_expressions import evaluate
from .find_adapter_branch import Region
from .linear_steps import Step


@dataclass(frozen=True)
class Affine:
    """x -> x M + c; M None is the identity, then scale [in] or a number may multiply x."""

    matrix: Tensor | None
    bias: Tensor | None = None
    scale: Tensor | None = None


def why_not_one(region: Region) -> str | None:
    """The sentence why a region's steps do not multiply to one matrix, or None."""
    convolution = region.style == "convolution"
    added = [node for node, _ in region.terms if len(region.terms) > 1]
    added += [node for s in region.steps.values() if s.kind == "sum" for node, _ in s.reads]
    if any(_reaches_source(node, region) for node in added):
        return f"one of its branches is %{region.source.name} itself, which costs nothing"
    for node, step in region.steps.items():
        bottom = step.reads[0][0] is region.source
        if step.kind == "lookup" and not bottom:
            return f"%{node.name} looks its rows up with another branch's result"
        if convolution and step.kind in ("product", "lookup"):
            return f"%{node.name} is no convolution and the branch beside it is one"
        if convolution and step.kind == "layout" and not _is_cast(node):
            return f"%{node.name} lays out anew what is convolved"
        values = [step.weight] if step.kind == "scale" else []
        values += [value for value, _ in step.bias] if step.kind != "convolution" else []
        if any(not _by_channel(value, node, region) for value in values):
            return f"%{node.name} adds or multiplies by more than one number a channel"
    if any(not _by_channel(value, region.root, region) for value, _ in region.constants):
        return f"%{region.root.name} adds more than one number a channel"
    return _why_not_convolved(region) if convolution else _why_not_batched(region)


def _is_cast(node: Node) -> bool:
    return "to" in str(node.target)


def _why_not_batched(region: Region) -> str | None:
    weights = [region.steps[n].weight for n in region.products]
    deep = any(weight.meta["val"].dim() > 2 for weight in weights)
    regrouped = [n for n, s in region.steps.items() if s.kind == "layout" and not _is_cast(n)]
    if deep and regrouped:
        return f"%{regrouped[0].name} regroups the axis of matrices"
    return None


def _why_not_convolved(region: Region) -> str | None:
    settings: list[Any] = []
    for node in region.products:
        step = region.steps[node]
        kernel = tuple(step.weight.meta["val"].shape[2:])
        if _reaches_source(step.reads[0][0], region):
            settings.append((kernel, step.settings))
            continue
        ones = (1,) * len(kernel)
        plain = {"stride": ones, "padding": (0,) * len(kernel)}
        if kernel != ones or any(step.settings[name] != value for name, value in plain.items()):
            return f"%{node.name} convolves a second time"
    if any(other != settings[0] for other in settings[1:]):
        return "its branches convolve with other kernels, strides or paddings"
    return None


def _reaches_source(value: Node, region: Region) -> bool:
    """Whether a value is the source, but for scalings."""
    while value is not region.source:
        step = region.steps[value]
        if step.kind not in ("scale", "layout"):
            return False
        value = step.reads[0][0]
    return True


def _by_channel(value: Any, node: Node, region: Region) -> bool:
    """Whether a constant has one number for each channel, or one for all."""
    if not isinstance(value, fx.Node):
        return True
    sizes = list(value.meta["val"].shape)
    rank = node.meta["val"].dim()
    after = rank - 2 if region.style == "convolution" else 0
    place = len(sizes) - 1 - after
    return all(size == 1 for axis, size in enumerate(sizes) if axis != place)


class _Composer:
    def __init__(self, program: Program, region: Region) -> None:
        self.program, self.region = program, region
        self.convolution = region.style == "convolution"
        self.known: dict[Node, Affine] = {region.source: Affine(None)}

    def total(self) -> Affine:
        for node, step in self.region.steps.items():
            self.known[node] = self._apply(step)
        parts = [_times(self.known[node], _number(f)) for node, f in self.region.terms]
        total = parts[0]
        for part in parts[1:]:
            total = self._plus(total, part)
        for value, factor in self.region.constants:
            total = self._shifted(total, value, factor)
        return total

    def _apply(self, step: Step) -> Affine:
        if step.kind == "sum":
            parts = [_times(self.known[node], _number(f)) for node, f in step.reads]
            total = parts[0]
            for part in parts[1:]:
                total = self._plus(total, part)
        else:
            before = self.known[step.reads[0][0]]
            if step.kind == "layout":
                return before
            if step.kind == "scale":
                factor = self._vector(step.weight)
                return _times(before, 1 / factor if step.inverse else factor, self.convolution)
            total = self._times_matrix(before, step)
        for value, factor in step.bias:
            total = self._shifted(total, value, factor)
        return total

    def _times_matrix(self, before: Affine, step: Step) -> Affine:
        weight = evaluate(self.program, step.weight, float64=True)
        if self.convolution:
            return _convolved(before, weight)
        matrix = weight.transpose(-1, -2) if step.turned else weight
        bias = before.bias
        if bias is not None:
            bias = bias.expand(matrix.shape[-2]) @ matrix
        if before.matrix is not None:
            return Affine(before.matrix @ matrix, bias)
        if before.scale is None:
            return Affine(matrix, bias)
        scale = before.scale if before.scale.dim() == 0 else before.scale[:, None]
        return Affine(scale * matrix, bias)

    def _vector(self, value: Any) -> Tensor:
        """A constant as float64: a number, or one for each channel."""
        if not isinstance(value, fx.Node):
            return _number(float(value))
        made = evaluate(self.program, value, float64=True).double()
        return made.reshape(()) if made.numel() == 1 else made.reshape(-1)

    def _shifted(self, affine: Affine, value: Any, factor: float) -> Affine:
        added = self._vector(value) * factor
        bias = added if affine.bias is None else affine.bias + added
        return Affine(affine.matrix, bias, affine.scale)

    def _plus(self, a: Affine, b: Affine) -> Affine:
        assert a.matrix is not None and b.matrix is not None  # see why_not_one
        if a.bias is None or b.bias is None:
            bias = b.bias if a.bias is None else a.bias
        else:
            bias = a.bias + b.bias
        return Affine(a.matrix + b.matrix, bias)


def merged(program: Program, region: Region) -> Affine:
    """The matrix and the bias of a region that `why_not_one` has nothing against."""
    return _Composer(program, region).total()


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _times(a: Affine, factor: Tensor, convolution: bool = False) -> Affine:
    bias = None if a.bias is None else a.bias * factor
    if a.matrix is None:
        return Affine(None, bias, factor if a.scale is None else a.scale * factor)
    spread = convolution and factor.dim() == 1
    along = factor.reshape(-1, *[1] * (a.matrix.dim() - 1)) if spread else factor
    return Affine(a.matrix * along, bias)


def _convolved(before: Affine, kernel: Tensor) -> Affine:
    if before.matrix is None:
        scale = before.scale
        if scale is not None:
            kernel = kernel * (scale if scale.dim() == 0 else scale.reshape(1, -1, *_ones(kernel)))
        return Affine(kernel, before.bias)
    mixed = kernel.flatten(1)  # [out, middle]: a kernel of one place
    bias = None if before.bias is None else mixed @ before.bias.expand(mixed.shape[1])
    return Affine(torch.einsum("om,mi...->oi...", mixed, before.matrix), bias)


def _ones(kernel: Tensor) -> list[int]:
    return [1] * (kernel.dim() - 2)
