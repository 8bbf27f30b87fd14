"""int8 codes of activations by token, on the CPU: each row's largest magnitude, then its codes.

The same codes as planish::activation_scale and planish::quantize give, bit for bit, for rows of
finite numbers; others get a step of NaN. See linear_w8a8_cpu.c.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from . import native
from .linear_w8a8_cpu import SOURCE
from .quantized_rows import quantized_twin
from .spec import Cost, KernelSpec


def why_not(dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take values of `dtype`; None if it can."""
    if dtype != torch.float32:
        return f"the activations are {dtype}, and the kernel reads float32"
    built = native.library(SOURCE)
    return built if isinstance(built, str) else None


def quantize_rows_cpu_twin(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., channels], scale float32 [..., 1]) of x float32 [..., channels]."""
    return quantized_twin(x, None, "int8")


def _launch(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    _function()(
        x.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        scale.numel(),
        x.shape[-1],
        torch.get_num_threads(),
    )
    return codes, scale


@cache
def _function() -> ctypes._NamedFuncPointer:
    built = native.library(SOURCE)
    assert isinstance(built, ctypes.CDLL), built
    function = built.planish_quantize_rows
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3
    function.restype = None
    return function


def cost(tokens: int, length: int) -> Cost:
    """x read once from memory and once from cache; codes and steps written."""
    return Cost(tokens * (5 * length + 4), 2 * tokens * length)


_LIBRARY = torch.library.Library("planish", "FRAGMENT")
_LIBRARY.define("quantize_rows_cpu(Tensor x) -> (Tensor, Tensor)")
_LIBRARY.impl("quantize_rows_cpu", _launch, "CPU")


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((*x.shape[:-1], 1), dtype=torch.float32),
    )


torch.library.register_fake("planish::quantize_rows_cpu", _fake, lib=_LIBRARY)

SPEC = KernelSpec(
    name="quantize_rows_cpu",
    device="cpu",
    serves="int8 codes of activations, a scale a token",
    why_not=why_not,
    cost=cost,
    twin=quantize_rows_cpu_twin,
)
