"""Operands of generated kernels as rows or as one vector; copied only where memory demands it."""

from __future__ import annotations

from torch import Tensor


def as_rows(x: Tensor, width: int) -> Tensor:
    """[..., width] as [rows, width] with the columns side by side and rows evenly apart."""
    x = x.reshape(-1, width)
    return x if x.stride(1) == 1 or width == 1 else x.contiguous()


def as_vector(x: Tensor) -> Tensor:
    """Any tensor as one contiguous axis."""
    return x.reshape(-1).contiguous()
