"""A small chain of a table, a gate, a transposed weight and a head, with a dead input channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Stack(nn.Module):
    """rows, width: of the table; the others are [80, width], [80, 36] (transposed) and [31, 36]."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.table = nn.Embedding(rows, width)
        self.up, self.gate = nn.Linear(width, 80), nn.Linear(width, 80, bias=False)
        self.down = nn.Parameter(torch.randn(80, 36) / 9)
        self.last = nn.Linear(36, 31)
        with torch.no_grad():
            self.table.weight[:, 5] = 0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.last(torch.tanh(self.up(x) * self.gate(x)) @ self.down)
