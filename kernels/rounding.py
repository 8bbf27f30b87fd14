"""Rounding to codes inside Triton kernels: to the nearest, ties to even, as torch.round does."""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_half_even(x, low, high):
    """Nearest integers of float32 values held between low and high (within 2**22).

    Adding 1.5 * 2**23 leaves no bits for a fraction, so the sum rounds as the hardware does. The
    clamp comes first: it keeps the trick in its range, and it stands between a product and the sum
    so that the two cannot be fused and round only once.
    """
    x = tl.minimum(tl.maximum(x, low), high)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def rounded_int8(x, step):
    """Codes -127 to 127 of x / step; a step of zero gives code 0 for x = 0."""
    step = tl.where(step == 0, 1.0, step)
    return round_half_even(tl.div_rn(x, step), -127.0, 127.0).to(tl.int8)


@triton.jit
def rounded_e4m3(x, step):
    """Codes of x / step in fp8 e4m3, saturated at its largest value, 448."""
    step = tl.where(step == 0, 1.0, step)
    held = tl.minimum(tl.maximum(tl.div_rn(x, step), -448.0), 448.0)
    return held.to(tl.float8e4nv)
