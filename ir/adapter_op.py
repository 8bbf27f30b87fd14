"""The operation of several low-rank adapters, each row of a batch with one of its own.

Defined as in `ops`: schema, shape rule and reference in one function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import _define


def _adapters(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: Tensor, chosen: Tensor) -> Tensor:
    """y + scale[n] * (x a[n]^T) b[n]^T where n = chosen[row of the batch]; y where n is negative.

    Hu et al. 2021, "LoRA", eq. 3, batched as in Sheng et al. 2023, "S-LoRA", sec. 5.
    y: [batch, ..., out] and x: [batch, ..., in], or both with batch and the axes after it joined;
    a: [adapters, rank, in] and b: [adapters, out, rank], an adapter of lower rank padded by zeros;
    scale: [adapters]; chosen: integers [batch]. Computed in x's dtype. Returns y's shape and dtype.
    """
    batch = chosen.shape[0]
    number = chosen.clamp_min(0).to(torch.int64)
    rows = x.reshape(batch, -1, x.shape[-1])
    low = torch.bmm(rows, a.index_select(0, number).transpose(1, 2).to(x.dtype))
    wide = torch.bmm(low, b.index_select(0, number).transpose(1, 2).to(x.dtype))
    update = wide * scale.index_select(0, number).to(x.dtype)[:, None, None]
    has = (chosen >= 0)[:, None, None]
    update = torch.where(has, update, torch.zeros_like(update))
    return y + update.reshape(y.shape).to(y.dtype)


_define(
    "adapters(Tensor y, Tensor x, Tensor a, Tensor b, Tensor scale, Tensor chosen) -> Tensor",
    _adapters,
)
