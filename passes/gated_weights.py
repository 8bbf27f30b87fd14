"""Weights with gates on units: a unit's value is scaled by its gate where it is read, or made.

A gate of 0 leaves what a program computes without the unit (`masked`), a gate of 1 all of it, and
what is between scales the unit's value once: on the columns that read it. Under a norm, which takes
statistics of its values, it is scaled where it is made instead: on rows, biases and tables; and on
the weights of a layer norm once more, which would shift a value of 0. Queries and keys need no
gate, as nobody reads them but the head that has one. (A table that is also the head reads what it
makes, so there the square of a gate acts.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from ..ir.channel_map import ChannelMap, Key
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.prunable_units import Unit

_ATEN, _OURS = torch.ops.aten, torch.ops.planish
_NORMS = {
    _OURS.rms_norm.default,
    _ATEN.rms_norm.default,
    _ATEN.layer_norm.default,
}

Owners = dict[str, dict[int, Tensor]]
"""weight -> axis -> int64 [size]: the unit whose gate scales the entry, -1 where none does."""


def gated_axes(program: Program, channels: ChannelMap, units: Sequence[Unit]) -> Owners:
    """The weight axes that gates of these units are multiplied onto."""
    unit_of = {root: place for place, unit in enumerate(units) for root in unit.roots}
    normed, shifting = _normed(program, channels)
    read = {root for key in channels.absorbs for root in channels.axes[key].tolist()}
    unit_of = {root: unit for root, unit in unit_of.items() if root in read}
    found: Owners = {}
    for key, roots in channels.axes.items():
        owners = torch.tensor(
            [
                unit_of[root] if root in unit_of and _acts(channels, key, root in normed) else -1
                for root in roots.tolist()
            ]
        )
        if key[0] not in shifting and channels.produces.get(key) == "norm":
            continue
        if bool((owners >= 0).any()) and program.weights.dtype(key[0]).is_floating_point:
            found.setdefault(key[0], {})[key[1]] = owners
    return found


def _acts(channels: ChannelMap, key: Key, normed: bool) -> bool:
    return key in channels.produces if normed else key in channels.absorbs


def _normed(program: Program, channels: ChannelMap) -> tuple[set[int], set[str]]:
    """The roots that norms take statistics of, and the weights of norms that shift."""
    roots: set[int] = set()
    shifting: set[str] = set()
    for node in program.graph.nodes:
        if node.target not in _NORMS:
            continue
        given = bound_arguments(node)
        source = channels.values(given["x"] if "x" in given else given["input"])
        if source is not None:
            roots |= set(source.unique().tolist())
        if node.target is _ATEN.layer_norm.default:
            held: list[object] = [given["weight"], given["bias"]]
            shifting |= {_name(program, n) for n in held if isinstance(n, fx.Node)}
    return roots - {0}, shifting


def _name(program: Program, node: Node) -> str:
    return program.weights.canonical(str(node.target)) if node.op == "get_attr" else ""


class GatedWeights:
    """Reads a program's weights by name, with the gates that were set last multiplied onto them.

    Of half precision those with gates come in float32.
    """

    def __init__(self, program: Program, channels: ChannelMap, units: Sequence[Unit]) -> None:
        self.weights, self.offsets = program.weights, channels.offsets
        self.axes = gated_axes(program, channels, units)
        self._fixed: dict[str, Tensor] = {}
        self._gated: dict[str, Tensor] = {}
        self._gates = torch.ones(len(units))

    def set(self, gates: Tensor) -> None:
        """gates: floating-point [units], with a gradient or not."""
        self._gates, self._gated = gates, {}

    def __call__(self, name: str) -> Tensor:
        name = self.weights.canonical(name)
        if name not in self.axes:
            return self.fixed(name)
        if name not in self._gated:
            weight, offset = self.fixed(name), self.offsets.get(name, 0.0)
            half = weight.dtype in (torch.float16, torch.bfloat16)
            weight = (weight.float() if half else weight) + offset
            for axis, owners in self.axes[name].items():
                factor = torch.where(owners < 0, 1.0, self._gates[owners.clamp_min(0)])
                form = [-1 if a == axis else 1 for a in range(weight.dim())]
                weight = weight * factor.reshape(form).to(weight.dtype)
            self._gated[name] = weight - offset
        return self._gated[name]

    def fixed(self, name: str) -> Tensor:
        """The weight as it is."""
        name = self.weights.canonical(name)
        if name not in self._fixed:
            self._fixed[name] = self.weights[name].detach()
        return self._fixed[name]


__all__ = ["GatedWeights", "Owners", "gated_axes"]
