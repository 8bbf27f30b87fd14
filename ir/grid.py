"""The values that each group of a weight may take, once a format has fixed its parameters.

Methods that choose codes one at a time (GPTQ, OBQ, AutoRound) need no more of a format than this,
so they work with every group-wise one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .encoded import Format


@dataclass(frozen=True, eq=False)
class Grid:
    """Fixed parameters of groups, [rows, groups, ...] each, by names that are the format's own.

    stored: the parameters as the format keeps them, where these are more than the above rounded
    (scales that are codes themselves); a part of a grid has none, and cannot be encoded on.
    """

    format: Format
    parameters: Mapping[str, Tensor]
    dtype: torch.dtype
    stored: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])

    def nearest(self, values: Tensor) -> Tensor:
        """`values` [rows, groups, any number] moved to the nearest values of their groups' grids.

        In the dtype of `values`, which should be float32 or float64.
        """
        return self.format.nearest(self, values)

    def of_groups(self, at: slice) -> Grid:
        """The grids of some of the groups."""
        parts = {name: part[:, at] for name, part in self.parameters.items()}
        return Grid(self.format, parts, self.dtype)

    @staticmethod
    def join(grids: Sequence[Grid]) -> Grid:
        """Grids of the same rows side by side, for formats whose `groups_apart` is true."""
        first = grids[0]
        names = first.parameters
        parts = {name: torch.cat([g.parameters[name] for g in grids], dim=1) for name in names}
        return Grid(first.format, parts, first.dtype)


__all__ = ["Grid"]
