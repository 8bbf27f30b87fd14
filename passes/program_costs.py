"""What a program costs when some channels are gone, without cutting it: parameters and FLOPs.

parameters: floating-point weight entries. flops: two for each multiplication of a product with a
weight (matmuls, convolutions) and of attention, at the sizes of one call; elementwise work, norms,
look-ups and other products of two activations (scans, convolution of states) are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..ir.channel_map import ChannelMap
from ..ir.errors import WrongOrder
from ..ir.interpret import run
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.weight_roles import weight_roles

_ATEN = torch.ops.aten
_CONVOLUTIONS = {
    _ATEN.conv1d.default,
    _ATEN.conv1d.padding,
    _ATEN.conv2d.default,
    _ATEN.conv2d.padding,
    _ATEN.convolution.default,
}
_ATTENTIONS = {
    torch.ops.planish.attention.default,
    _ATEN.scaled_dot_product_attention.default,
}


@dataclass(frozen=True)
class ProgramCosts:
    """The costs of one program as sums over live entries.

    reads: weight -> how often one call multiplies each of its entries (the mean, where a choice
    of them is read). pairs: attention node -> (query, key) pairs of one head, of the whole batch.
    """

    program: Program
    channels: ChannelMap
    reads: dict[str, float]
    pairs: dict[Node, float]

    def parameters(self, dead: Iterable[int] = ()) -> int:
        """Weight entries that are left when channel classes go."""
        alive = self._alive(dead)
        weights = self.program.weights
        return sum(
            math.prod(self._kept(name, alive))
            for name in weights
            if weights.dtype(name).is_floating_point
        )

    def flops(self, dead: Iterable[int] = ()) -> float:
        """Floating-point operations of products and attentions, at the sizes that were seen."""
        alive = self._alive(dead)
        products = sum(2 * n * math.prod(self._kept(name, alive)) for name, n in self.reads.items())
        pairs = 0.0
        for heads in self.channels.attentions:
            live = int(alive[heads.query].sum()) + int(alive[heads.out].sum())
            pairs += 2 * self.pairs.get(heads.node, 0.0) * live
        return products + pairs

    def _alive(self, dead: Iterable[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """By root: whether it stays."""
        most = max((int(roots.max(initial=0)) for roots in self.channels.axes.values()), default=0)
        for heads in self.channels.attentions:
            most = max(most, int(heads.query.max(initial=0)), int(heads.out.max(initial=0)))
        alive = np.ones(most + 1, dtype=np.bool_)
        gone = np.fromiter(self.channels.closure(dead), dtype=np.int64)
        alive[gone[gone <= most]] = False
        return alive

    def _kept(self, name: str, alive: np.ndarray[Any, np.dtype[np.bool_]]) -> list[int]:
        sizes = list(self.program.weights.shape(name))
        for axis in range(len(sizes)):
            roots = self.channels.axes.get((name, axis))
            if roots is not None:
                sizes[axis] = int(alive[roots].sum())
        return sizes


def program_costs(
    program: Program, channels: ChannelMap, calibration: Sequence[Sequence[Any]], *, flops: bool
) -> ProgramCosts:
    """Look at one call, of the program's examples or else of the first batch.

    flops: whether they will be asked for; without, nothing is run. Raises WrongOrder.
    """
    if not flops:
        return ProgramCosts(program, channels, {}, {})
    readers = _readers(program)
    reads: dict[str, float] = {}
    pairs: dict[Node, float] = {}

    def watch(node: Node, value: Any) -> None:
        if node in readers:
            name, axis = readers[node]
            entries = program.weights.shape(name)
            summed = entries[axis] if axis is not None else entries.numel() // entries[0]
            reads[name] = reads.get(name, 0.0) + value.numel() * summed / max(entries.numel(), 1)
        elif node in lengths:
            shape = value.shape
            pairs[node] = float(shape[0] * shape[2]) * lengths[node]
        for attention in keys.get(node, ()):
            lengths[attention] = value.shape[2]

    keys, lengths = _keys(program), dict[Node, int]()
    run(program, example_call(program, calibration), watch=watch)
    return ProgramCosts(program, channels, reads, pairs)


def example_call(program: Program, calibration: Sequence[Sequence[Any]]) -> list[Any]:
    """Flat inputs of the call whose cost is meant; raises WrongOrder if there are none."""
    if program.examples:
        return list(program.examples)
    if calibration:
        return list(calibration[0])
    raise WrongOrder(
        "the program has no example inputs, so what a call costs is not known",
        fix="pass calibration=[(ids,), ...]: its first batch is the call that is counted",
    )


def _readers(program: Program) -> dict[Node, tuple[str, int | None]]:
    """Product -> its weight and the axis that it sums over (None: a convolution, all but one)."""
    found: dict[Node, tuple[str, int | None]] = {}
    for role in weight_roles(program):
        for node in role.matmuls:
            found[node] = (role.name, role.axis if role.axis is not None else -1)
        for node in role.others:
            if node.target in _CONVOLUTIONS and bound_arguments(node)["weight"] is role.node:
                found[node] = (role.name, None)
    return found


def _keys(program: Program) -> dict[Node, list[Node]]:
    """Value -> the attentions whose keys it is."""
    found: dict[Node, list[Node]] = {}
    for node in program.graph.nodes:
        if node.target in _ATTENTIONS:
            given = bound_arguments(node)
            key: Any = given["k"] if "k" in given else given["key"]
            if isinstance(key, fx.Node) and isinstance(key.meta.get("val"), Tensor):
                found.setdefault(key, []).append(node)
    return found


__all__ = ["ProgramCosts", "example_call", "program_costs"]
