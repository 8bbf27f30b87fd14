"""A small model whose matrices can be put into any format, for the tests of targets."""

from __future__ import annotations

import torch
from planish.ir.capture import capture_module
from planish.ir.encoded import Format
from planish.ir.program import Program
from torch import Tensor, nn

IDS = torch.randint(0, 101, (3, 5), generator=torch.Generator().manual_seed(4))


class Coded(nn.Module):
    """A table, a linear with a bias, a product with an [in, out] matrix, and an output."""

    def __init__(self, width: int = 72) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.width = width
        self.table = nn.Embedding(101, width)
        self.up = nn.Linear(width, 40)
        self.mix = nn.Parameter(torch.randn(40, width) / 6)
        self.head = nn.Linear(width, 101, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.relu(self.up(self.table(ids)))
        bias = hidden.new_zeros(self.width)
        mixed = torch.addmm(bias, hidden.flatten(0, 1), self.mix)
        return self.head(mixed.unflatten(0, ids.shape))


def coded(width: int = 72, dtype: torch.dtype = torch.float32) -> Program:
    """The model as a program; any batch and length."""
    return capture_module(Coded(width).to(dtype), (torch.zeros(2, 7, dtype=torch.int64),))


def in_format(program: Program, fmt: Format, table: Format | None = None) -> Program:
    """A copy with all matrices in `fmt`, grouped along the axis that is summed over.

    table: the format of the looked-up table; None takes `fmt`.
    """
    made = program.copy()
    for name, weight in list(program.weights.items()):
        if weight.dim() == 2:
            chosen = (table or fmt) if name == "table.weight" else fmt
            made.weights[name] = chosen.encode(weight, -2 if name == "mix" else -1)
    return made
