"""Save where a pruned program's weights are zero: the masks of a lottery ticket.

Before and after: the same program. The file holds a bool tensor for each pruned weight, by the
weight's own name and in its shape, true where the value stays: `apply_masks` prunes the network's
first weights with it (the winning ticket of Frankle & Carbin 2019, sec. 1), and any other reader
can multiply by it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..ir.errors import PlanishError, WrongOption
from ..ir.program import Program
from ..ir.weight_roles import weight_roles
from ..ir.write_safetensors import Planned, write_safetensors
from .contract import Context, Pass, contract


class NothingPruned(PlanishError):
    """Masks were asked for of a program whose weights hold no zeros to speak of."""


@dataclass(frozen=True)
class SaveMasks(Pass):
    """Write the masks of pruned weights to a safetensors file; the program stays as it is.

    path: of the file, which is replaced. least: the share of zeros from which on a weight counts as
    pruned.
    """

    path: str = "masks.safetensors"
    least: float = 0.01

    contract = contract("exact", requires=["functional"])

    def __post_init__(self) -> None:
        if not self.path:
            raise WrongOption("option save_masks.path is empty", expected="a file to write")

    def run(self, program: Program, context: Context) -> None:
        roles = [role for role in weight_roles(program) if role.matmuls and not role.tables]
        zeros = {role.name: _share_of_zeros(program.weights[role.name]) for role in roles}
        pruned = [role for role in roles if zeros[role.name] >= self.least]
        for role in roles:
            if zeros[role.name] < self.least:
                reason = f"less than {self.least:.0%} of it is zero"
                context.journal.declined(self.pass_name(), role.name, reason)
        if not pruned:
            raise NothingPruned(
                "no weight of the program is pruned",
                expected=f"weights of which at least {self.least:.0%} is zero",
                found=f"{len(roles)} weights of matmuls, none of them so",
                fix="prune first, for example prune_magnitude{sparsity=50%}",
            )
        if not context.journal.offers():
            return
        file = Path(self.path).expanduser()
        aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
        write_safetensors(aside, {role.name: _mask(program, role.name) for role in pruned})
        aside.rename(file)
        for role in pruned:
            said = f"{zeros[role.name]:.1%} zeros, saved to {file.name}"
            context.journal.noted(self.pass_name(), role.node, said)


def _share_of_zeros(weight: Tensor) -> float:
    return int((weight == 0).sum()) / max(weight.numel(), 1)


def _mask(program: Program, name: str) -> Planned:
    """The mask of a weight, made when it is written: one at a time is in memory."""
    shape = tuple(program.weights.shape(name))
    return Planned(shape, torch.bool, lambda: program.weights[name] != 0)
