"""Learn which units of a program matter: gates on all of them, trained on the calibration text.

Every unit gets a hard concrete gate (`hard_concrete`); the weights stay. The loss is the cross
entropy of the text for models of next tokens, and the distance from the whole program's results for
others. Lagrangian terms l1 (s - t) + l2 (s - t)^2 hold the expected share s of open gates of every
group at the share t that is to be kept, and grow by gradient ascent while it is not (Wang et al.
2020, "Structured Pruning of Large Language Models", sec. 3.2; Xia et al. 2024, "Sheared LLaMA",
eq. 2-4). t falls from 1 to its end over the first part of the steps.
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

_FIRST = 0.95
"""The share of gates that are open at first."""
_FALL = 0.3
"""The part of the steps in which the wanted shares fall to what is to be kept."""


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
    that of one batch's values and of one scaled copy of the weights with gates. lr: of AdamW on the
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
        work = _Learning(program, channels, units, groups, context.calibration, lr, seed)
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


class _Learning:
    def __init__(
        self,
        program: Program,
        channels: ChannelMap,
        units: Sequence[Unit],
        groups: _Groups,
        batches: Sequence[Sequence[Any]],
        lr: float,
        seed: int,
    ) -> None:
        self.groups, self.batches = groups, batches
        self.program = program
        self.noise = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.loss = gate_loss(program, batches[0])
        self.weights = GatedWeights(program, channels, [units[place] for place in groups.free])
        self.log_alpha = torch.full((len(groups.free),), log_alpha_of(_FIRST)).requires_grad_()
        count = len(groups.sizes)
        self.linear, self.quadratic = (torch.zeros(count, requires_grad=True) for _ in range(2))
        self.down = torch.optim.Adam([self.log_alpha], lr=lr)
        self.up = torch.optim.Adam([self.linear, self.quadratic], lr=lr, maximize=True)

    def step(self, step: int, steps: int) -> tuple[float, float]:
        """The loss, and the share of open gates."""
        if not self.order:
            self.order = torch.randperm(len(self.batches), generator=self.noise).tolist()
        number = self.order.pop()
        batch = self.batches[number]
        fallen = min(1.0, (step + 1) / max(1.0, _FALL * steps))
        wanted = _FIRST + (self.groups.kept - _FIRST) * fallen
        with torch.enable_grad():
            uniform = torch.rand(len(self.log_alpha), generator=self.noise)
            self.weights.set(sampled_gates(self.log_alpha, uniform))
            loss = self.loss(batch, self.weights, self.weights.fixed)
            if not bool(loss.isfinite()):
                raise nonfinite_activation(self.program, batch, number, self.program.results[0])
            over = self.groups.shares(self.log_alpha) - wanted
            held = (self.linear * over + self.quadratic * over.square()).sum()
            self.down.zero_grad()
            self.up.zero_grad()
            (loss + held).backward()
        self.down.step()
        self.up.step()
        return float(loss.detach()), float(open_share(self.log_alpha.detach()).mean())


__all__ = ["learn_scores"]
