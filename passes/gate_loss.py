"""What gates are trained on: the text, or the whole program's own results.

A program whose logits at a place hang on the tokens before it alone predicts the next token, and is
trained on the cross entropy of the text. Others (encoders, vision models) are held to what the
program without gates computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.interpret import run
from ..ir.program import Program
from .next_token_loss import NextTokenLoss, NoNextToken, next_token_loss

Weight = Callable[[str], Tensor]
_LEAST = 1e-30


@dataclass(frozen=True)
class GateLoss:
    """next_tokens None: the distance from the program's own results."""

    program: Program
    next_tokens: NextTokenLoss | None
    wide: bool

    def __call__(self, batch: Sequence[Any], gated: Weight, whole: Weight) -> Tensor:
        """A scalar with gradients by what `gated` reads; whole: the weights without gates."""
        found = run(self.program, batch, weight=gated, float64=self.wide, gradients=True)
        if self.next_tokens is not None:
            return self.next_tokens(batch, found)
        wanted = run(self.program, batch, weight=whole, float64=self.wide)
        parts = [
            (a - b).square().mean() / b.square().mean().clamp_min(_LEAST)
            for a, b in zip(found, wanted, strict=True)
            if isinstance(b, Tensor) and b.is_floating_point() and b.numel()
        ]
        return torch.stack(parts).mean()


def gate_loss(program: Program, batch: Sequence[Any]) -> GateLoss:
    """The loss for this program; batch: flat inputs to try it on. Half precision runs in float64,
    where small gradients do not vanish."""
    kinds = {program.weights.dtype(name) for name in program.weights}
    wide = bool(kinds & {torch.float16, torch.bfloat16})
    try:
        found = next_token_loss(program)
    except NoNextToken:
        return GateLoss(program, None, wide)
    return GateLoss(program, found if _causal(program, found, batch) else None, wide)


def _causal(program: Program, loss: NextTokenLoss, batch: Sequence[Any]) -> bool:
    """Whether other tokens in the second half leave the logits of the first half, but for rounding,
    as they were."""
    ids: Tensor = batch[loss.ids]
    half = ids.shape[1] // 2
    if half < 1:
        return False
    other, tail, first = ids.clone(), ids[:, half:], ids[:, :1].expand_as(ids[:, half:])
    other[:, half:] = torch.where(tail == first, (first - 1).abs(), first)
    changed = [other if place == loss.ids else value for place, value in enumerate(batch)]
    before, after = (run(program, given)[loss.logits] for given in (batch, changed))
    limit = torch.finfo(before.dtype).eps ** 0.5 * max(float(before.abs().max()), _LEAST)
    return float((before - after)[:, :half].abs().max()) <= limit


__all__ = ["GateLoss", "Weight", "gate_loss"]
