"""Which values of a weight may stay: a share of them, or N in every M along the summed axis.

Patterns are written "50%" (or 0.5): half of the values zero, wherever they lie; "2:4": two of every
four neighbours along the summed axis stay (Mishra et al. 2021, sec. 3); "4:8": four of every eight.
A last group of fewer than M neighbours keeps at most N, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import WrongOption

SCOPES = ("row", "matrix")
"""Among which values a share is chosen: each row's own, or all of a weight's."""


@dataclass(frozen=True)
class Sparsity:
    """rate: the share of zeros. keep, of: N and M of N:M; 0, 0 where zeros may lie anywhere."""

    rate: float
    keep: int = 0
    of: int = 0

    @property
    def structured(self) -> bool:
        """Whether it is N:M."""
        return self.of > 0

    @property
    def name(self) -> str:
        """As `parse_sparsity` reads it."""
        return f"{self.keep}:{self.of}" if self.structured else f"{self.rate * 100:g}%"

    def mask(self, scores: Tensor, scope: str = "matrix") -> Tensor:
        """bool [rows, in]: what stays, of scores [rows, in], the largest; ties keep the first.

        scope: of a share; N:M is chosen in every group of a row.
        """
        if self.structured:
            return self._of_groups(scores)
        if scope == "row":
            return largest(scores, scores.shape[1] - self.zeros(scores.shape[1]))
        flat = scores.reshape(1, -1)
        return largest(flat, flat.shape[1] - self.zeros(flat.shape[1])).view(scores.shape)

    def zeros(self, count: int) -> int:
        """How many of `count` values become zero where they may lie anywhere."""
        return min(count, round(self.rate * count))

    def holds(self, rows: Tensor) -> bool:
        """Whether values [rows, in] have this pattern: N:M in every group, a share over all."""
        if not self.structured:
            return int((rows == 0).sum()) >= self.zeros(rows.numel())
        return not bool((self._groups(rows != 0).sum(-1) > self.keep).any())

    def _of_groups(self, scores: Tensor) -> Tensor:
        width = scores.shape[1]
        groups = torch.nn.functional.pad(scores, (0, -width % self.of), value=-torch.inf)
        groups = groups.view(len(scores) * (groups.shape[1] // self.of), self.of)
        return largest(groups, self.keep).view(len(scores), -1)[:, :width].contiguous()

    def _groups(self, values: Tensor) -> Tensor:
        """[rows, groups, M]; a last group is filled with zeros."""
        return torch.nn.functional.pad(values, (0, -values.shape[1] % self.of)).unflatten(
            1, (-1, self.of)
        )


def largest(scores: Tensor, count: int) -> Tensor:
    """bool [rows, n]: the `count` largest of each row; of equal ones the first."""
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


def parse_sparsity(text: str, where: str) -> Sparsity:
    """The pattern of "50%", "0.5" or "2:4"; where: the option, for errors. Raises WrongOption."""
    text = text.strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        keep, of = int(match[1]), int(match[2])
        if 0 < keep < of:
            return Sparsity(1 - keep / of, keep, of)
    elif match := re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(%?)", text):
        rate = float(match[1]) / (100 if match[2] else 1)
        if 0 < rate < 1:
            return Sparsity(rate)
    raise WrongOption(
        f"option {where} is no pattern of zeros",
        expected="the share of zeros, more than 0 and less than 100% (50% or 0.5), or how many "
        "stay in every group of neighbours (2:4, 4:8)",
        found=repr(text),
        fix="write 50%, or 2:4; to leave a weight alone name it in skip",
    )


__all__ = ["SCOPES", "Sparsity", "largest", "parse_sparsity"]
