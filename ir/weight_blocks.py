"""Walking over the rows of a weight in blocks, so that temporary memory does not grow with it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .errors import UnsupportedShape

CHUNK = 1 << 19
"""Elements worked on at once: 2 MB in float32, so that the steps of rounding find them in cache."""


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_weight(weight: Tensor, axis: int, where: str) -> None:
    """Raise UnsupportedShape unless `weight` can be encoded with groups along `axis`."""
    fits = (
        weight.is_floating_point() and weight.numel() > 0 and -weight.dim() <= axis < weight.dim()
    )
    if not fits:
        raise UnsupportedShape(
            "only a floating-point tensor that is not empty can be encoded, along one of its axes",
            where=where,
            expected="a tensor [..., out, in]",
            found=f"{weight.dtype} {list(weight.shape)} with groups along axis {axis}",
            fix="leave this weight dense",
        )


def row_blocks(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks [some rows, length] of `rows` [..., length] with their place among all rows.

    A weight with another axis grouped is a transposed view here; only a block of it is copied.
    """
    length = rows.shape[-1]
    if rows.dim() < 3 or rows.is_contiguous():
        matrices = [rows.reshape(-1, length)]
    else:
        matrices = list(rows.flatten(0, -3))
    step, start = max(1, CHUNK // length), 0
    for matrix in matrices:
        for block in matrix.split(step):
            yield slice(start, start + block.shape[0]), block
            start += block.shape[0]


def row_slices(count: int, length: int) -> Iterator[slice]:
    """Places of blocks among `count` rows of `length` values."""
    step = max(1, CHUNK // length)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


__all__ = ["CHUNK", "check_weight", "compute_dtype", "row_blocks", "row_slices"]
