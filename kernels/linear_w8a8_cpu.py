"""Linear layers on int8 activations and affine integer weights, on the CPU, in integer sums.

y = ((codes - zero) * scale) @ decode(weight).T + bias, where the sums over a group of columns are
of bytes times bytes and exact: what is rounded is their product with the scales, and the sum of
the groups. A processor without byte products (AVX512 VNNI) runs the same in plain C.
See linear_w8a8_cpu.c.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from ..ir.encoded import Encoded
from ..ir.formats import AffineInt
from ..ir.interleaved import Interleaved
from . import native
from .linear_affine import PackedAffine, decoded
from .linear_affine import why_not as weight_why_not
from .spec import Cost, KernelSpec

SOURCE = "linear_w8a8_cpu.c"
LONGEST = 33_000
"""Columns up to which every sum of products of codes stays within 32 bits."""


def why_not(encoded: Encoded, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take this weight with codes of a value of `dtype`; None if it can."""
    if reason := weight_why_not(encoded, dtype):
        return reason
    if encoded.rows_shape[-1] > LONGEST:
        return f"sums over {encoded.rows_shape[-1]} products may not fit in 32 bits"
    built = native.library(SOURCE)
    return built if isinstance(built, str) else None


def code_sums(encoded: Encoded) -> Tensor:
    """int32 [tiles, groups, 16]: what a zero point of activations is multiplied with.

    The sums over each group of the codes less the middle code (of the stored width).
    """
    fmt = encoded.format
    assert isinstance(fmt, AffineInt)
    length = encoded.rows_shape[-1]
    steps = encoded.codes().to(torch.int32) - (1 << (fmt.bits - 1))
    parts = [part.sum(1) for part in steps.split(fmt.group_size or length, 1)]
    return Interleaved(fmt.bits, fmt.group_size).pack_groups(torch.stack(parts, 1).int())


def linear_w8a8_cpu_twin(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    rows: int,
    length: int,
    width: int,
    group: int,
) -> Tensor:
    """The kernel in plain torch and float64: float32 [..., rows].

    codes: int8 [..., length]; scale, zero (int32): one, or one for each row of codes; sums: unused
    here (see `code_sums`), there if zero is; the others as in `PackedAffine`.
    """
    flat = codes.reshape(-1, length).double()
    steps = flat if zero is None else flat - zero.reshape(-1, 1)
    matrix = decoded(weight, weight_scale, weight_zero, rows, length, width, group).double()
    found = (steps * scale.reshape(-1, 1).double()) @ matrix.t()
    found = found if bias is None else found + bias.double()
    return found.float().reshape(*codes.shape[:-1], rows)


def _launch(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    rows: int,
    length: int,
    width: int,
    group: int,
) -> Tensor:
    codes, scale = codes.contiguous(), _flat(scale, torch.float32)
    zero = None if zero is None else _flat(zero, torch.int32)
    bias = None if bias is None else _flat(bias, torch.float32)
    out = torch.empty((*codes.shape[:-1], rows), dtype=torch.float32)
    tokens = codes.numel() // length
    failed = _product()(
        codes.data_ptr(),
        scale.data_ptr(),
        _address(zero),
        int(scale.numel() > 1),
        weight.data_ptr(),
        weight_scale.data_ptr(),
        _address(weight_zero),
        _address(sums),
        _address(bias),
        out.data_ptr(),
        tokens,
        rows,
        length,
        group,
        weight.stride(0),
        width,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a product with {tokens} tokens")
    return out


def _flat(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if values.dtype == dtype and values.is_contiguous() else values.to(dtype)


def _address(values: Tensor | None) -> int | None:
    return None if values is None else values.data_ptr()


@cache
def _product() -> ctypes._NamedFuncPointer:
    built = native.library(SOURCE)
    assert isinstance(built, ctypes.CDLL), built
    function = built.planish_linear_w8a8
    pointers, numbers = [ctypes.c_void_p], [ctypes.c_int64]
    function.argtypes = [*pointers * 3, *numbers, *pointers * 6, *numbers * 7]
    return function


def cost(tokens: int, packed: PackedAffine) -> Cost:
    """Codes of the weight, scales, codes of x and the result once each."""
    parts = (packed.codes, packed.scale, packed.zero)
    weight = sum(part.nbytes for part in parts if part is not None)
    moved = tokens * (packed.length + 4 + 4 * packed.rows)
    return Cost(weight + moved, 2 * tokens * packed.rows * packed.length)


_LIBRARY = torch.library.Library("planish", "FRAGMENT")
_LIBRARY.define(
    "linear_w8a8_cpu(Tensor codes, Tensor scale, Tensor? zero, Tensor weight, "
    "Tensor weight_scale, Tensor? weight_zero, Tensor? sums, Tensor? bias, int rows, int length, "
    "int width, int group) -> Tensor"
)
_LIBRARY.impl("linear_w8a8_cpu", _launch, "CPU")


def _fake(codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, weight_scale: Tensor,
          weight_zero: Tensor | None, sums: Tensor | None, bias: Tensor | None, rows: int,
          length: int, width: int, group: int) -> Tensor:  # fmt: skip
    return codes.new_empty((*codes.shape[:-1], rows), dtype=torch.float32)


torch.library.register_fake("planish::linear_w8a8_cpu", _fake, lib=_LIBRARY)

SPEC = KernelSpec(
    name="linear_w8a8_cpu",
    device="cpu",
    serves="linear layers on int8 activations and affine integer weights of 2 to 8 bits",
    why_not=why_not,
    cost=cost,
    twin=linear_w8a8_cpu_twin,
)
