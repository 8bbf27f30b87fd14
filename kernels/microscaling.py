"""Microscaling formats in plain torch, as the kernels take them: blocks of small floats.

mxfp4 and mxfp8: blocks of 32 with a power of two (OCP Microscaling Formats v1.0, sec. 5 and 6);
nvfp4: blocks of 16 with an e4m3 scale, and one float32 for the whole weight. The formats of
weights, and their arithmetic, are those of `ir.format_mx`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.format_fp8 import fp8_codes
from ..ir.format_mx import E2M1, Microscaled, power_codes, powers

BLOCKS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
"""Values that share a scale, by format."""


def blocks_decoded(codes: Tensor, scales: Tensor, format: str, dtype: torch.dtype) -> Tensor:
    """Values [N, K] in dtype. codes: uint8 [N, K / 2], e2m1 in pairs, the earlier value low; or,
    of mxfp8, float8_e4m3fn [N, K]. scales: [N, blocks], of nvfp4 float8_e4m3fn, else uint8 (e8m0:
    2^(code - 127), 255 is NaN). The last block of a row may be short.
    """
    if format == "mxfp8":
        values = codes.to(dtype)
    else:
        table = torch.tensor(E2M1, dtype=dtype, device=codes.device)
        pairs = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
        values = table[pairs.long()]
    wide = scales.to(dtype) if format == "nvfp4" else powers(scales).to(dtype)
    return values * wide.repeat_interleave(BLOCKS[format], -1)[..., : values.shape[-1]]


def blocks_encoded(values: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """(codes, scales) of values [N, K] as `blocks_decoded` takes them, K even; rounded to nearest.

    nvfp4 here has no scale of the whole weight: its scales are largest magnitudes over 6.
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
        scales = power_codes(most, 2 if format == "mxfp4" else 8)
        steps = powers(scales).float()
    flat = (blocks / steps[..., None]).reshape(rows, -1)[:, :length]
    if format == "mxfp8":
        return fp8_codes(flat, "e4m3").view(torch.float8_e4m3fn), scales
    codes = Microscaled("mxfp4").nearest_codes(flat)
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales
