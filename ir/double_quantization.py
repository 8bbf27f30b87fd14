"""Scales that are quantized themselves: QLoRA's double quantization (Dettmers et al. 2023, sec. 3).

Block maxima lose their mean and become 8-bit codes of the dynamic map (Dettmers 2016, "8-bit
approximations for parallelism in deep learning", sec. 2; signed, up to 7 exponent digits), with a
float32 maximum for every 256 of them in row-major order. The arithmetic is that of the published
bitsandbytes: difference of the mean, product with the reciprocal of the maximum, nearest entry,
the lower of two that are equally near.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

EVERY = 256
"""Scales that share a second-level one."""


@cache
def dynamic_map() -> Tensor:
    """The 256 entries in order, float32: for each decimal exponent 0 to -6 equal fractions.

    The tenfold range of exponent -i is cut into 2^(6-i) pieces a sign, whose middles are entries.
    """
    entries = [0.0, 1.0]
    for exponent in range(7):
        cuts = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10.0 ** (exponent - 6) * ((cuts[:-1] + cuts[1:]) / 2.0)
        entries += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(entries), dtype=torch.float32)


def quantized_scales(scale: Tensor) -> dict[str, Tensor]:
    """Positive scales [rows, groups] as codes uint8 of that shape, second-level maxima float32
    [ceil(rows * groups / 256)] and the mean float32 [1].
    """
    flat = scale.float().flatten()
    offset = flat.mean()
    blocks = torch.nn.functional.pad(flat - offset, (0, -flat.numel() % EVERY)).view(-1, EVERY)
    second = blocks.abs().amax(-1)
    scaled = blocks * (1.0 / second.clamp(min=1e-38)).unsqueeze(-1)
    table = dynamic_map()
    middles = ((table[:-1] + table[1:]) / 2).to(scaled.device)
    codes = torch.bucketize(scaled.clamp_(-1, 1), middles, out_int32=True).to(torch.uint8)
    codes = codes.flatten()[: flat.numel()].view(scale.shape)
    return {"scale": codes, "second": second, "offset": offset.reshape(1)}


def restored_scales(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factor [rows, groups] of such parts, float32, and its doubt: how far it may be off."""
    codes = parts["scale"]
    table = dynamic_map().to(codes.device)
    second = parts["second"].repeat_interleave(EVERY)[: codes.numel()].view(codes.shape)
    found = table.index_select(0, codes.flatten().int()).view(codes.shape)
    factor = found * second + parts["offset"]
    gaps = torch.nn.functional.pad(table.double().diff(), (1, 1))
    cell = torch.maximum(gaps[:-1], gaps[1:]) / 2
    cell[0] = torch.maximum(cell[0], 1 + table[0].double())
    doubt = cell.to(codes.device)[codes.long()] * second.double()
    rounding = (factor.double().abs() + second.double() + parts["offset"].double()) * 2.0**-22
    return {"factor": factor, "doubt": doubt + rounding}


def kept_maxima(count: int) -> int:
    """How many second-level maxima `count` scales have."""
    return -(-count // EVERY)


__all__ = ["EVERY", "dynamic_map", "kept_maxima", "quantized_scales", "restored_scales"]
