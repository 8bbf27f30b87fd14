"""The grids of all groups of a matrix, fixed one at a time or all at once, and rounding to them.

For affine formats the rounding of a column is spelled out, because it is the inner loop of GPTQ;
every other format rounds through its own `Grid`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.affine import grouped
from ..ir.format_affine import AffineInt
from ..ir.format_offset import AffineOffset
from ..ir.formats import Format
from ..ir.grid import Grid


@dataclass(frozen=True)
class _Line:
    """value = offset + scale * a whole number from lowest to highest; [rows] each, or scalars."""

    scale: Tensor
    lowest: Tensor
    highest: Tensor
    offset: Tensor | None


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
        self._lines: dict[int, _Line] = {}

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
        fmt = self.format
        if isinstance(fmt, AffineInt):
            zero = grid.parameters.get("zero_point")
            centre = torch.tensor(float(1 << (fmt.bits - 1)))
            centre = centre if zero is None else zero[:, 0].float()
            lowest, offset = int(fmt.code_range == "narrow"), None
        elif isinstance(fmt, AffineOffset):
            centre, lowest, offset = torch.zeros(()), 0, grid.parameters["offset"][:, 0].float()
        else:
            return
        scale = grid.parameters["scale"][:, 0].float()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        self._lines[group] = _Line(scale, lowest - centre, (1 << fmt.bits) - 1 - centre, offset)

    def nearest(self, group: int, column: Tensor) -> Tensor:
        """One column of a group [rows], moved to the grid; float32."""
        line = self._lines.get(group)
        if line is None:
            return self._grids[group].nearest(column[:, None, None])[:, 0, 0]
        above = column if line.offset is None else column - line.offset
        codes = (above / line.scale).round_().clamp_(line.lowest, line.highest)
        values = codes.mul_(line.scale)
        return values if line.offset is None else values.add_(line.offset)

    def line(self, group: int) -> _Line | None:
        """Of an affine format whose groups are apart, the line that a group's values lie on."""
        return self._lines.get(group) if self.format.groups_apart else None

    def move_line(self, group: int, factor: Tensor, shift: Tensor | None = None) -> None:
        """Multiply a group's scales by `factor` [rows] and add `shift` to its offsets.

        As far as their dtype can: `line` then says what came out.
        """
        old = self._grids[group]
        parameters = dict(old.parameters)
        kept = parameters["scale"]
        new = (kept.float() * factor.unsqueeze(1)).to(kept.dtype)
        parameters["scale"] = torch.where((new == 0) | ~torch.isfinite(new), kept, new)
        if isinstance(self.format, AffineOffset):
            if shift is not None:
                parameters["offset"] = parameters["offset"] + shift.unsqueeze(1)
            stored = self.format.keep(parameters, self.dtype)
            parameters = self.format.restore(stored, len(kept), 1)
        self._whole = None
        self._set(group, Grid(self.format, parameters, old.dtype))

    def grid(self) -> Grid:
        """All groups' grids as one."""
        if self._whole is None:
            self._whole = Grid.join([self._grids[group] for group in range(self.count)])
        return self._whole


__all__ = ["GroupGrids"]
