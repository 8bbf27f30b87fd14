"""What a recipe changes at a program's outputs on batches that it was not calibrated on."""

from __future__ import annotations

import torch
from torch import Tensor

from .ir.interpret import run
from .ir.program import Program
from .passes.calibrate import Batches
from .passes.judge import Progress, quiet
from .passes.pipeline import Pipeline
from .recipes import Recipe
from .search_sensitivity import is_distribution


def divergence(
    program: Program,
    recipe: Recipe,
    calibration: Batches,
    held_out: Batches,
    progress: Progress = quiet,
) -> float:
    """Run the recipe, then both programs: the mean KL in nats, or half the relative squared error.

    The first is for outputs that are a distribution over words, see `search_sensitivity`.
    """
    line = Pipeline(recipe.passes())
    line.progress = progress
    after = line.run(program, calibration=[list(batch) for batch in calibration])
    total, positions = 0.0, 0
    for number, batch in enumerate(held_out):
        progress(number, len(held_out), "measuring")
        truth, found = (_rows(run(each, batch)) for each in (program, after))
        changes = _changes(truth, found, is_distribution(program, truth))
        total += float(changes.sum())
        positions += len(changes)
    return total / positions


def _rows(outputs: list[object]) -> Tensor:
    """The first floating-point output as float32 [positions, ...]."""
    floating = [o for o in outputs if isinstance(o, Tensor) and o.is_floating_point()]
    return floating[0].flatten(0, -2).float()


def _changes(truth: Tensor, found: Tensor, distribution: bool) -> Tensor:
    """By position."""
    if distribution:
        logs = truth.log_softmax(-1)
        return (logs.exp() * (logs - found.log_softmax(-1))).sum(-1)
    sizes = truth.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (found - truth).square().sum(-1) / sizes / 2


__all__ = ["divergence"]
