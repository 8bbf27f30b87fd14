"""Cut experts of routed layers: router rows and expert weights go together.

Before: `%s = linear(%x, %R) : f32[n, 8]`, `topk(%s, 2)`, `index(%W, [%chosen])` with
`%W : f32[8, 80, 48]`. After two experts are cut: `%s : f32[n, 6]` and `%W : f32[6, 80, 48]`; the
router chooses as many for each token as before. Equal to the program whose router never chooses
those that are gone. Which go: see `expert_importance` (as in Lu et al. 2024, "Not All Experts are
Equal", sec. 3, whole experts are left out after training, by what they give).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ir.errors import WrongOption
from ..ir.expert_cut import check_kept, cut_expert_rows
from ..ir.expert_layers import ExpertLayer, expert_layers
from ..ir.program import Program
from .contract import Context
from .expert_importance import expert_importance

_NAME = "cut_experts"


def count_experts(program: Program) -> list[int]:
    """The number of experts of each routed layer, in graph order."""
    return [layer.experts for layer in expert_layers(program)]


def cut_experts(program: Program, context: Context, counts: Sequence[int]) -> None:
    """Cut `counts[i]` experts of the i-th routed layer in place, the least important ones.

    By what they give on `context.calibration`, or by their weights without. Where experts are
    routed in groups, each group loses as many. Raises WrongOption, CannotCutExperts.
    """
    layers = expert_layers(program)
    if len(counts) != len(layers) or any(count < 0 for count in counts):
        raise WrongOption(
            "the numbers of experts to cut do not fit the program",
            expected=f"{len(layers)} numbers, one for each routed layer",
            found=str(list(counts)),
            fix="see count_experts",
        )
    for layer, count in zip(layers, counts, strict=True):
        check_kept(layer, layer.experts - count)
    if not any(counts):
        return
    scores = expert_importance(program, layers, context)
    for layer, count, score in zip(layers, counts, scores, strict=True):
        if count and context.journal.offers():
            kept = _kept(layer, count, score)
            gone = sorted({*range(layer.experts)} - {*kept})
            told = f"{count} of {layer.experts} experts of {layer.module}: "
            told += ", ".join(map(str, gone))
            cut_expert_rows(program, layer, kept)
            context.journal.noted(_NAME, layer.chooser, told)


def _kept(layer: ExpertLayer, count: int, score: Tensor) -> list[int]:
    """The most important experts, as many of each group, sorted."""
    size = layer.experts // layer.groups
    stay = size - count // layer.groups
    ranked = torch.argsort(-score.reshape(layer.groups, size), dim=1, stable=True)[:, :stay]
    numbers = ranked + size * torch.arange(layer.groups)[:, None]
    return sorted(numbers.flatten().tolist())


__all__ = ["count_experts", "cut_experts"]
