"""Apply saved masks: the weights of another training state of the same network become sparse.

Before: `%w` is dense, for example as it was when training began. After: `%w` is zero where the mask
says so, and as it was elsewhere; the graph stays. With the masks of the trained, pruned network
this is the winning ticket, to be trained again from there.
Source: the lottery ticket hypothesis, Frankle & Carbin 2019, sec. 1.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..ir.errors import PlanishError, WrongOption
from ..ir.history import Measured
from ..ir.program import Program
from ..ir.read_safetensors import read_safetensors
from .contract import Context, Pass, contract

_TOLD = 10


class WrongMasks(PlanishError):
    """Masks that are of another network."""


@dataclass(frozen=True)
class ApplyMasks(Pass):
    """Set weights to zero where the masks of a file, as `save_masks` writes it, are false.

    path: of the safetensors file: a bool tensor for each weight, by its name and in its shape.
    """

    path: str = ""

    contract = contract("lossy", requires=["functional", "dense_weights"], min_sqnr=-20.0)

    def run(self, program: Program, context: Context) -> None:
        if not self.path:
            raise WrongOption(
                "apply_masks needs the file of the masks",
                expected="apply_masks{path=masks.safetensors}",
                found="no path",
                fix="write one with save_masks",
            )
        masks = read_safetensors(Path(self.path).expanduser())
        _check(program, masks, self.path)
        zeros = size = 0
        for done, (name, mask) in enumerate(masks.items()):
            context.progress(done, len(masks), name)
            name = program.weights.canonical(name)
            if not context.journal.offers():
                continue
            weight = program.weights[name]
            program.weights[name] = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
            cut = mask.numel() - int(mask.sum())
            zeros, size = zeros + cut, size + mask.numel()
            said = f"{cut / mask.numel():.1%} zeros by its mask"
            context.journal.changed_weight(self.pass_name(), name, said)
        if size:
            what = "share of zeros in the masked weights"
            context.journal.measured.append(Measured(what, 0.0, zeros / size, math.inf))


def _check(program: Program, masks: Mapping[str, Tensor], path: str) -> None:
    """Raise WrongMasks, which tells of the first ten that do not fit."""
    wrong = [reason for name, mask in masks.items() if (reason := _why_not(program, name, mask))]
    if wrong or not masks:
        more = f", and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise WrongMasks(
            f"{len(wrong)} of {len(masks)} masks do not fit the program"
            if masks
            else "the file holds no masks",
            where=path,
            expected="bool tensors by the names of weights, in their shapes",
            found="; ".join(wrong[:_TOLD]) + more,
            fix="take masks of the same network, as save_masks writes them",
        )


def _why_not(program: Program, name: str, mask: Tensor) -> str | None:
    if name not in program.weights:
        near = difflib.get_close_matches(name, list(program.weights), n=1, cutoff=0.6)
        return f"{name}: no weight has this name" + (f" (near: {near[0]})" if near else "")
    shape = list(program.weights.shape(name))
    if mask.dtype != torch.bool:
        return f"{name}: its mask is {str(mask.dtype).removeprefix('torch.')}, not bool"
    if list(mask.shape) != shape:
        return f"{name}: its mask is {list(mask.shape)}, the weight {shape}"
    return None
