"""Learn which units of a program matter: gates on all of them, trained on the calibration text.

Every unit gets a hard concrete gate (`hard_concrete`); the weights stay. The loss is the cross
entropy of the text for models of next tokens, and the distance from the whole program's results for
others. Lagrangian terms l1 (s - t) + l2 (s - t)^2 hold the expected share s of open gates of every
group at the share t that is to be kept, and grow by gradient ascent while it is not (Wang et al.
2020, "Structured Pruning of Large Language Models", sec. 3.2; Xia et al. 2024, "Sheared LLaMA",
eq. 2-4). t falls from where the gates begin over the first part of the steps.

Our own: gates begin nearer to closed where `unit_importance` by wanda is small, and multipliers are
counted in the mean slope of the loss; so a few hundred steps are enough, where the papers take
thousands, and no rate of the multipliers has to be found for a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.channel_map import ChannelMap
from ..ir.errors import WrongInput, WrongOption
from ..ir.program import Program
from ..ir.prunable_units import Kind, Unit
from .calibrate import check_batches
from .contract import Context
from .gate_loss import gate_loss
from .gated_weights import GatedWeights
from .hard_concrete import log_alpha_of, open_share, sampled_gates
from .nonfinite_activation import nonfinite_activation
from .unit_importance import unit_importance

_FIRST = 0.95
"""The share of gates that are open at first."""
_FALL = 0.3
"""The part of the steps in which the wanted shares fall to what is to be kept."""
_LEAN = 1.0
"""How far gates begin apart from each other, for one standard deviation."""
_HELD, _ASCENT = 50.0, 2.0
"""The quadratic multipliers at first, and how fast all of them grow."""


def learn_scores(
    program: Program,
    channels: ChannelMap,
    units: Sequence[Unit],
    keep: Mapping[tuple[Kind, str], int],
    context: Context,
    *,
    steps: int = 200,
    lr: float = 0.05,
    seed: int = 0,
) -> list[float]:
    """For each unit the probability that its gate is open in the end; higher stays.

    program: raised, with dense weights, which are read and not changed. channels: its map. keep:
    how many units of each (kind, group) stay; groups that are not named keep all. One batch of
    context.calibration a step, forward and backward, in the order of a seeded shuffle; memory is
    that of one batch's values and of one scaled copy of the weights with gates. lr: of Adam on the
    gates' parameters. Raises WrongOption, WrongInput, CalibrationTooSmall, NonFiniteActivation.
    """
    if steps < 1 or not lr > 0:
        raise WrongOption(
            "gates cannot be learned like this",
            expected="steps of 1 or more, lr of more than 0",
            found=f"steps={steps}, lr={lr}",
            fix="leave them out for the defaults",
        )
    check_batches(program, context.calibration)
    groups = _Groups(units, keep)
    scores = [1.0] * len(units)
    if groups.free:
        free = [units[place] for place in groups.free]
        importance = unit_importance(program, channels, free, "wanda", context)
        start = log_alpha_of(_FIRST) + _LEAN * groups.normal_scores(importance)
        weights = GatedWeights(program, channels, free)
        work = _Learning(program, weights, groups, context.calibration, start, lr, seed)
        for step in range(steps):
            loss, share = work.step(step, steps)
            context.progress(step + 1, steps, f"gates: loss {loss:.4g}, open {share:.1%}")
        learned = open_share(work.log_alpha.detach().double()).tolist()
        for place, score in zip(groups.free, learned, strict=True):
            scores[place] = score
    return scores


class _Groups:
    """Units of groups that lose some. free: their places; group: int64, the group of each; sizes,
    kept: float32 [groups], how many units there are and the share of them that stays."""

    def __init__(self, units: Sequence[Unit], keep: Mapping[tuple[Kind, str], int]) -> None:
        places: dict[tuple[Kind, str], list[int]] = {}
        for place, unit in enumerate(units):
            places.setdefault((unit.kind, unit.group), []).append(place)
        for name, held in places.items():
            if not 0 <= keep.get(name, 0) <= len(held):
                raise WrongInput(
                    f"{keep[name]} of the {name[0]} of {name[1]} cannot be kept",
                    expected=f"0 to {len(held)}",
                    found=str(keep[name]),
                    fix="count the units of each group",
                )
        cut = {name: held for name, held in places.items() if keep.get(name, len(held)) < len(held)}
        self.free = [place for held in cut.values() for place in held]
        sizes = torch.tensor([len(held) for held in cut.values()], dtype=torch.int64)
        self.group = torch.arange(len(sizes)).repeat_interleave(sizes)
        self.sizes = sizes.float()
        self.kept = torch.tensor([float(keep[name]) for name in cut]) / self.sizes

    def shares(self, log_alpha: Tensor) -> Tensor:
        """The expected share of open gates of every group."""
        total = torch.zeros_like(self.sizes).index_add(0, self.group, open_share(log_alpha))
        return total / self.sizes

    def normal_scores(self, values: Sequence[float]) -> Tensor:
        """Of each value by its rank in its group, the place in a normal distribution."""
        given = torch.tensor(values, dtype=torch.float64)
        found = torch.zeros(len(given))
        for number in range(len(self.sizes)):
            here = (self.group == number).nonzero().flatten()
            ordered = given[here].sort().values
            below = torch.searchsorted(ordered, given[here])
            upto = torch.searchsorted(ordered, given[here], right=True)
            rank = (below + upto) / (2 * len(here))
            found[here] = torch.special.ndtri(rank).float()
        return found


class _Learning:
    """Gates and multipliers of one training, and its loss."""

    def __init__(
        self,
        program: Program,
        weights: GatedWeights,
        groups: _Groups,
        batches: Sequence[Sequence[Any]],
        start: Tensor,
        lr: float,
        seed: int,
    ) -> None:
        self.program, self.weights = program, weights
        self.groups, self.batches = groups, batches
        self.noise = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.loss = gate_loss(program, batches[0])
        self.log_alpha = start.clone().requires_grad_()
        self.adam = torch.optim.Adam([self.log_alpha], lr=lr)
        self.first = groups.shares(start)
        self.linear = torch.zeros_like(groups.sizes)
        self.quadratic = torch.full_like(groups.sizes, _HELD)
        self.slopes = torch.zeros_like(groups.sizes)

    def step(self, step: int, steps: int) -> tuple[float, float]:
        """Gates descend, multipliers ascend; returns the loss and the share of open gates."""
        with torch.enable_grad():
            loss = self._loss()
            (slope,) = torch.autograd.grad(loss, [self.log_alpha])
        fallen = min(1.0, (step + 1) / max(1.0, _FALL * steps))
        with torch.enable_grad():
            over = self.groups.shares(self.log_alpha) - self.first.lerp(self.groups.kept, fallen)
            held = self.linear * over + self.quadratic * over.square()
            weight = self._typical(slope, step) * self.groups.sizes
            (pull,) = torch.autograd.grad((weight * held).sum(), [self.log_alpha])
        self.log_alpha.grad = slope + pull
        self.adam.step()
        apart = over.detach()
        self.linear += _ASCENT * apart
        self.quadratic += _ASCENT * apart.square()
        return float(loss.detach()), float(open_share(self.log_alpha.detach()).mean())

    def _loss(self) -> Tensor:
        if not self.order:
            self.order = torch.randperm(len(self.batches), generator=self.noise).tolist()
        number = self.order.pop()
        uniform = torch.rand(len(self.log_alpha), generator=self.noise)
        self.weights.set(sampled_gates(self.log_alpha, uniform))
        loss = self.loss(self.batches[number], self.weights, self.weights.fixed)
        if not bool(loss.isfinite()):
            where = self.program.results[0]
            raise nonfinite_activation(self.program, self.batches[number], number, where)
        return loss

    def _typical(self, slope: Tensor, step: int) -> Tensor:
        """The mean size of the loss's slopes in each group, over the steps so far: multipliers are
        counted in it, so that they need no scale of the model's own."""
        sums = torch.zeros_like(self.slopes).index_add(0, self.groups.group, slope.abs())
        self.slopes += (sums / self.groups.sizes - self.slopes) / (step + 1)
        return self.slopes


__all__ = ["learn_scores"]
