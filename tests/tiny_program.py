"""A program small enough to load, optimize and write in a moment, saved as a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from planish import trace
from planish.ir.program_folder import save_program
from torch import Tensor, nn

RECIPE = """
name: small
description: for the tests of the command line
passes:
  - canonicalize
  - share_subexpressions
  - drop_dead
  - quantize_weights: {bits: 8, group_size: 16}
"""


class Tiny(nn.Module):
    """Token ids int64[batch, length] to scores f32[batch, length, 11]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(29, 48)
        self.up, self.down = nn.Linear(48, 80), nn.Linear(80, 11)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.down(self.up(self.table(input_ids)).relu())


def ids(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, 29, (batch, length), generator=torch.Generator().manual_seed(1))


def tiny(poison: float | None = None) -> Tiny:
    """A seeded model; `poison` replaces one weight of `up`."""
    torch.manual_seed(0)
    model = Tiny().eval().requires_grad_(False)
    if poison is not None:
        model.up.weight[3, 5] = poison
    return model


def save_tiny(folder: Path, poison: float | None = None) -> Path:
    return save_program(trace(tiny(poison), (), {"input_ids": ids()}), folder)


def write_recipe(folder: Path, text: str = RECIPE, name: str = "small.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)
