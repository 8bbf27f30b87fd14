"""The grids of all groups of a matrix, fixed one at a time or all at once, and rounding to them.

For affine integers the rounding of a column is spelled out, because it is the inner loop of GPTQ;
every other format rounds through its own `Grid`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.affine import grouped
from ..ir.format_affine import AffineInt
from ..ir.formats import Format
from ..ir.grid import Grid


class GroupGrids:
    """Grids of a matrix [rows, in] in groups along its last axis.

    dtype: of the weight in the model. where: names it in errors.
    """

    def __init__(self, fmt: Format, width: int, dtype: torch.dtype, where: str) -> None:
        self.format, self.width, self.dtype, self.where = fmt, width, dtype, where
        self.size = fmt.grouping(width)
        self.count = -(-width // self.size)
        self._grids: dict[int, Grid] = {}
        self._whole: Grid | None = None
        self._affine: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def span(self, group: int) -> slice:
        """The columns of a group."""
        return slice(group * self.size, min((group + 1) * self.size, self.width))

    def fix_all(self, matrix: Tensor, importance: Tensor) -> None:
        """Choose every group's grid for the values [rows, in], errors weighted by [in]."""
        self._whole = self._choose(matrix, importance)
        for group in range(self.count):
            self._set(group, self._whole.of_groups(slice(group, group + 1)))

    def fix(self, group: int, values: Tensor, importance: Tensor) -> None:
        """Choose one group's grid for its values [rows, group]; the format's groups are apart."""
        self._whole = None
        self._set(group, self._choose(values, importance))

    def _choose(self, values: Tensor, importance: Tensor) -> Grid:
        size = min(self.size, self.width)
        groups = grouped(values.float(), size)
        weights = grouped(importance.float().unsqueeze(0), size)
        weights.view(-1)[values.shape[1] :] = 0  # what fills a short group up does not count
        return self.format.grid(groups, weights[0], dtype=self.dtype, where=self.where)

    def _set(self, group: int, grid: Grid) -> None:
        self._grids[group] = grid
        if not isinstance(self.format, AffineInt):
            return
        scale = grid.parameters["scale"][:, 0].float()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        top, lowest = (1 << self.format.bits) - 1, int(self.format.code_range == "narrow")
        zero = grid.parameters.get("zero_point")
        centre = torch.tensor(float(1 << (self.format.bits - 1)))
        centre = centre if zero is None else zero[:, 0].float()
        self._affine[group] = scale, lowest - centre, top - centre

    def nearest(self, group: int, column: Tensor) -> Tensor:
        """One column of a group [rows], moved to the grid; float32."""
        if group in self._affine:
            scale, lowest, highest = self._affine[group]
            return (column / scale).round_().clamp_(lowest, highest).mul_(scale)
        return self._grids[group].nearest(column[:, None, None])[:, 0, 0]

    def rescale(self, group: int, factor: Tensor) -> Tensor | None:
        """Multiply a group's scales by `factor` [rows], as far as the scale's dtype can.

        Returns the factor that came out, or None if the format has no scale to be changed.
        """
        if group not in self._affine:
            return None
        old = self._grids[group]
        kept = old.parameters["scale"]
        new = (kept.float() * factor.unsqueeze(1)).to(kept.dtype)
        new = torch.where((new == 0) | ~torch.isfinite(new), kept, new)
        self._whole = None
        self._set(group, Grid(self.format, {**old.parameters, "scale": new}, old.dtype))
        before = torch.where(kept == 0, torch.ones_like(kept), kept).float()
        return torch.where(kept == 0, before, new.float() / before)[:, 0]

    def grid(self) -> Grid:
        """All groups' grids as one."""
        if self._whole is None:
            self._whole = Grid.join([self._grids[group] for group in range(self.count)])
        return self._whole


__all__ = ["GroupGrids"]
