"""What the loss says about units: sums of weight times gradient over everything that goes with one.

For a unit with weights w, the sum of w * dL/dw is the derivative of the loss L by a factor on all
of them, at 1: the first-order estimate of what cutting the unit changes (Molchanov et al. 2019,
"Importance Estimation for Neural Network Pruning", eq. 8; Ma et al. 2023, "LLM-Pruner", eq. 3).
Its mean square over batches is the empirical Fisher information of that factor (Liu et al. 2021,
"Group Fisher Pruning", eq. 5, by batches). One forward and one backward run a batch; a gradient is
reduced to sums when it arrives, so no two of them are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.channel_map import ChannelMap
from ..ir.interpret import run
from ..ir.program import Program
from ..ir.prunable_units import Unit
from .calibrate import check_batches
from .contract import Context
from .next_token_loss import next_token_loss
from .nonfinite_activation import nonfinite_activation


@dataclass(frozen=True)
class UnitGradients:
    """mean, square: over batches, of each unit's sum of w * dL/dw; float64 [units]."""

    mean: Tensor
    square: Tensor


def unit_gradients(
    program: Program, channels: ChannelMap, units: Sequence[Unit], context: Context
) -> UnitGradients:
    """Run every calibration batch forward and backward.

    In the program's own dtypes where they are float32, else in float64 (gradients of half
    precision underflow). Raises NoNextToken, CalibrationTooSmall, NonFiniteActivation.
    """
    loss = next_token_loss(program)
    check_batches(program, context.calibration)
    owned = _owners(program, channels, units)
    kinds = {program.weights.dtype(name) for name in program.weights}
    wide = any(kind.is_floating_point and kind != torch.float32 for kind in kinds)
    mean = torch.zeros(len(units), dtype=torch.float64)
    square = torch.zeros_like(mean)
    for number, batch in enumerate(context.calibration):
        context.progress(number, len(context.calibration), "gradients")
        sums = torch.zeros_like(mean)
        leaves = _Leaves(program, owned, channels, sums)
        results = run(program, batch, float64=wide, weight=leaves, gradients=True)
        value = loss(batch, results)
        if not bool(value.isfinite()):
            where = program.results[loss.logits]
            raise nonfinite_activation(program, batch, number, where)
        value.backward()
        mean += sums
        square += sums.square()
    context.progress(len(context.calibration), len(context.calibration), "gradients")
    count = len(context.calibration)
    return UnitGradients(mean / count, square / count)


Owners = dict[str, dict[int, Tensor]]
"""weight -> axis -> int64 [size]: the unit of each entry, -1 where it is of none."""


def _owners(program: Program, channels: ChannelMap, units: Sequence[Unit]) -> Owners:
    unit_of = {root: place for place, unit in enumerate(units) for root in unit.roots}
    found: Owners = {}
    for (name, axis), roots in channels.axes.items():
        owners = torch.tensor([unit_of.get(root, -1) for root in roots.tolist()])
        if bool((owners >= 0).any()) and program.weights.dtype(name).is_floating_point:
            found.setdefault(name, {})[axis] = owners
    return found


class _Leaves:
    """Reads weights; those with units as leaves whose gradients are summed up on arrival."""

    def __init__(self, program: Program, owned: Owners, channels: ChannelMap, sums: Tensor) -> None:
        self.weights, self.owned, self.offsets = program.weights, owned, channels.offsets
        self.sums = sums
        self.made: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        name = self.weights.canonical(name)
        if name not in self.owned:
            return self.weights[name].detach()
        if name not in self.made:
            weight = self.weights[name].detach()
            half = weight.dtype in (torch.float16, torch.bfloat16)
            leaf = (weight.float() if half else weight).requires_grad_()
            leaf.register_post_accumulate_grad_hook(self._catcher(name))
            self.made[name] = leaf
        return self.made[name]

    def _catcher(self, name: str) -> Callable[[Tensor], None]:
        def catch(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            product = gradient.mul_(leaf.detach() + self.offsets.get(name, 0.0))
            _add_sums(product, self.owned[name], self.sums)

        return catch


def _add_sums(product: Tensor, owners: dict[int, Tensor], sums: Tensor) -> None:
    """Add to each unit the sum of the entries that go with it, each entry once.

    An entry whose row and column are of one unit is counted by the first of both axes.
    """
    before: list[tuple[int, Tensor]] = []
    for axis, own in owners.items():
        counted = product
        for other, theirs in before:
            shared = set(own[own >= 0].tolist()) & set(theirs[theirs >= 0].tolist())
            if shared:
                counted = counted.masked_fill(
                    _along(own, axis, product.dim()) == _along(theirs, other, product.dim()), 0
                )
        rest = [a for a in range(product.dim()) if a != axis]
        totals = counted.sum(rest, dtype=torch.float64) if rest else counted.double()
        sums.index_add_(0, own[own >= 0], totals[own >= 0])
        before.append((axis, own))


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    return values.reshape([-1 if a == axis else 1 for a in range(rank)])


__all__ = ["UnitGradients", "unit_gradients"]
