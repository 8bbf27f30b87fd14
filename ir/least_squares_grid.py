"""Encode a weight on the affine grids of least squared error (see `affine_search`)."""

from __future__ import annotations

import torch
from torch import Tensor

from .affine import grouped
from .affine_search import best_parameters
from .encoded import Encoded
from .formats import AffineInt

_CHUNK = 1 << 20


def encode_least_squares(
    form: AffineInt, weight: Tensor, axis: int = -1, *, where: str = ""
) -> Encoded:
    """Encode `weight` [..., out, in] on the best of the grids tried for each group along `axis`.

    Works through blocks of rows, so temporary memory does not grow with the weight. Raises what
    `AffineInt.encode` raises.
    """
    rows = weight.detach().movedim(axis, -1)
    *lead, length = rows.shape
    flat = rows.reshape(-1, length)
    # what fills up a short group is no value of the weight
    real = grouped(torch.ones_like(flat[:1], dtype=torch.float32), form.group_size)
    real.view(-1)[length:] = 0
    dtype = form.scale_dtype or weight.dtype
    found = [
        best_parameters(form, grouped(block.float(), form.group_size), real[0], dtype, where)
        for block in flat.split(max(1, _CHUNK // length))
    ]
    scale = torch.cat([scale for scale, _ in found]).reshape(*lead, -1)
    if form.symmetric:
        return form.encode_with(weight, scale, axis=axis)
    zero = torch.cat([zero for _, zero in found if zero is not None]).reshape(*lead, -1)
    return form.encode_with(weight, scale, zero, axis=axis)
