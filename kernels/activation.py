"""Activations inside Triton kernels, by the names that `ir.ops` has; float32 in and out."""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid")


@triton.jit
def tanh(x):
    """By exp of a negative number, which does not overflow; libdevice is not in the interpreter."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def activate(x, NAME: tl.constexpr):
    if NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif NAME == "relu":
        x = tl.maximum(x, 0.0)
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    else:
        tl.static_assert(NAME == "none", "unknown activation")
    return x
