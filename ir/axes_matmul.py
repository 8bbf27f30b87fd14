"""The forms of a matrix product: which operand is the weight, and what is added to the result.

What channels do when they meet differs between the questions that axis flow answers; a question
gives its three answers, and gets the rules of all forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .axes_walk import ChannelWalk, Rule, Unfollowed
from .axes_weights import WeightView
from .pattern import bound_arguments
from .program import Node

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Matmul:
    """by_weight: (flow, node, source, its channels with the summed axis last, weight, summed axis,
    kept axis) -> the result's channels, [kept] or [..., kept]. of_values: (flow, node, channels of
    a, channels of b) -> those of the result. biased: (flow, node, channels, what is added) -> those
    of the sum.
    """

    by_weight: Callable[[ChannelWalk, Node, Node, Tensor, WeightView, int, int], Tensor]
    of_values: Callable[[ChannelWalk, Node, Tensor, Tensor], Tensor]
    biased: Callable[[ChannelWalk, Node, Tensor, Any], Tensor]

    def rules(self) -> dict[Any, Rule]:
        return {
            _ATEN.linear.default: self._linear,
            _ATEN.addmm.default: self._added("mat1", "mat2"),
            _ATEN.baddbmm.default: self._added("batch1", "batch2"),
            **dict.fromkeys(
                (_ATEN.mm.default, _ATEN.bmm.default, _ATEN.matmul.default), self._matmul
            ),
        }

    def _linear(self, flow: ChannelWalk, node: Node) -> Any:
        """x W^T + b: W's columns read the channels of x, its rows and b make the result's."""
        given = bound_arguments(node)
        weight = flow.view(given["weight"])
        if weight is None or len(weight.shape) != 2:
            raise Unfollowed("its weight is computed")
        x = given["input"]
        out = self.by_weight(flow, node, x, flow.ids(x), weight, 1, 0)
        return self.biased(flow, node, flow.fit(out, node), given["bias"])

    def _added(self, left: str, right: str) -> Rule:
        def rule(flow: ChannelWalk, node: Node) -> Any:
            given = bound_arguments(node)
            out = self._product(flow, node, given[left], given[right])
            return self.biased(flow, node, out, given["self"])

        return rule

    def _matmul(self, flow: ChannelWalk, node: Node) -> Any:
        return self._product(flow, node, node.args[0], node.args[1])

    def _product(self, flow: ChannelWalk, node: Node, a: Any, b: Any) -> Tensor:
        """a [..., i, k] b [..., k, j]."""
        left, right = flow.view(a), flow.view(b)
        if right is not None and left is None and len(right.shape) >= 2:
            return flow.fit(self.by_weight(flow, node, a, flow.ids(a), right, -2, -1), node)
        if left is not None and right is None and len(left.shape) >= 2:
            ids = flow.ids(b)
            ids = ids.transpose(-1, -2) if ids.dim() >= 2 else ids
            out = self.by_weight(flow, node, b, ids, left, -1, -2)
            if len(flow.shape(b)) >= 2:
                out = out.unsqueeze(-1) if out.dim() == 1 else out.transpose(-1, -2)
            return flow.fit(out, node)
        return self.of_values(flow, node, flow.ids(a), flow.ids(b))


__all__ = ["Matmul"]
