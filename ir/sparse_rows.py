"""A few values of a matrix by rows (CSR): row pointers, columns and values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

POINTERS, COLUMNS, VALUES = "outlier_rows", "outlier_columns", "outlier_values"
PARTS = frozenset({POINTERS, COLUMNS, VALUES})
"""The names of the three parts."""


def column_dtype(length: int) -> torch.dtype:
    """The integers that tell columns of rows of `length` values."""
    return torch.int16 if length <= 1 << 15 else torch.int32


def sparse(rows: Tensor, chosen: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values of `rows` [count, length] at `chosen`, flat places in order (int64)."""
    count, length = rows.shape
    per_row = torch.bincount(chosen // length, minlength=count)
    pointers = torch.cat([per_row.new_zeros(1), per_row.cumsum(0)])
    return {
        POINTERS: pointers.to(torch.int32),
        COLUMNS: (chosen % length).to(column_dtype(length)),
        VALUES: rows.reshape(-1)[chosen].to(dtype),
    }


def places(parts: Mapping[str, Tensor], length: int) -> Tensor:
    """The flat places (int64) of the kept values; the inverse of `sparse`."""
    pointers = parts[POINTERS].long()
    row = torch.repeat_interleave(
        torch.arange(len(pointers) - 1, device=pointers.device), pointers.diff()
    )
    return row * length + parts[COLUMNS].long()


def largest(rows: Tensor, importance: Tensor | None, count: int) -> Tensor:
    """The flat places, in order, of the `count` largest of importance * value^2.

    importance: [length] or of the shape of `rows`, not negative; None takes magnitudes.
    """
    size = rows.abs() if importance is None else rows.float().square() * importance
    return torch.topk(size.reshape(-1), count, sorted=False).indices.sort().values


__all__ = ["COLUMNS", "PARTS", "POINTERS", "VALUES", "column_dtype", "largest", "places", "sparse"]
