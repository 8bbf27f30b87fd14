"""Microscaling formats in plain torch: blocks of small floats that share a scale.

mxfp4 and mxfp8: blocks of 32 with a power of two (OCP Microscaling Formats v1.0, sec. 5 and 6);
nvfp4: blocks of 16 with an e4m3 scale, and one float32 for the whole weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
"""Values that share a scale, by format."""

_LARGEST = {"mxfp4": 6.0, "mxfp8": 448.0, "nvfp4": 6.0}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def blocks_decoded(codes: Tensor, scales: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """Values [N, K] in dtype. codes: uint8 [N, K / 2], e2m1 in pairs, the earlier value low; or,
    of mxfp8, float8_e4m3fn [N, K]. scales: [N, blocks], of nvfp4 float8_e4m3fn, else uint8 (e8m0:
    2^(code - 127), 255 is NaN). The last block of a row may be short.
    """
    if format == "mxfp8":
        values = codes.to(dtype)
    else:
        table = torch.tensor([*_E2M1, *(-v for v in _E2M1)], dtype=dtype, device=codes.device)
        pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        values = table[pairs.long()]
    wide = scales.to(dtype) if format == "nvfp4" else powers(scales).to(dtype)
    return values * wide.repeat_interleave(BLOCKS[format], -1)[..., : values.shape[-1]]


def powers(scales: Tensor) -> Tensor:
    """The powers of two of e8m0 codes, in float64."""
    exact = torch.pow(2.0, scales.to(torch.float64) - 127)
    return torch.where(scales == 255, torch.nan, exact)


def blocks_encoded(values: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """(codes, scales) of values [N, K] as `blocks_decoded` takes them, K even; rounded to nearest.

    The power of two is the one that OCP's sec. 6.3 gives: of the block's largest magnitude over
    that of the format's largest power; nvfp4 takes the largest magnitude over 6, rounded to e4m3.
    """
    size = BLOCKS[format]
    rows, length = values.shape
    padded = torch.nn.functional.pad(values.float(), (0, -length % size))
    blocks = padded.reshape(rows, -1, size)
    most = blocks.abs().amax(-1)
    if format == "nvfp4":
        scales = (most / 6).clamp(2.0**-9, 448).to(torch.float8_e4m3fn)
        steps = scales.float()
    else:
        top = 2 if format == "mxfp4" else 8
        exponent = torch.floor(torch.log2(most.clamp_min(2.0**-126))) - top
        scales = (exponent + 127).clamp(0, 254).to(torch.uint8)
        steps = powers(scales).float()
    scaled = (blocks / steps[..., None]).clamp(-_LARGEST[format], _LARGEST[format])
    flat = scaled.reshape(rows, -1)[:, :length]
    if format == "mxfp8":
        return flat.to(torch.float8_e4m3fn), scales
    # ties go to the even code: those below are odd where a midpoint belongs to the upper one
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    low = torch.bucketize(flat.abs(), middles)
    high = torch.bucketize(flat.abs(), middles, right=True)
    code = torch.where(low % 2 == 0, low, high) | ((flat < 0) * 8)
    return (code[:, 0::2] | (code[:, 1::2] << 4)).to(torch.uint8), scales
