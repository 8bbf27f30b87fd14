"""Linear layers on packed affine integer weights, on the CPU: y = x @ decode(weight).T + bias.

Weights are read packed and every sum is carried to float32 rounding: up to four tokens with exact
byte products where the processor has them (AVX512 VNNI), else in float32; from nine tokens on as
blocked float32 products on rows that are decoded into cache. See affine_cpu.c.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.encoded import Encoded
from ..ir.formats import AffineInt
from ..ir.interleaved import Interleaved
from . import native
from .spec import Cost, KernelSpec

SOURCE = "affine_cpu.c"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedAffine:
    """An encoded weight [rows, length] laid out for the CPU kernels.

    codes: uint8 [tiles, bytes]; scale: float32 [tiles, groups, 16]; zero: the zero point minus
    the middle code, likewise, or None; width: stored bits; group: columns that share a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    rows: int
    length: int
    width: int
    group: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """rows, length, width, group: the last arguments of the operators."""
        return self.rows, self.length, self.width, self.group


def pack(encoded: Encoded) -> PackedAffine:
    """Lay out a weight that `why_not` lets through; groups along the summed axis."""
    fmt = encoded.format
    assert isinstance(fmt, AffineInt)
    rows, length = encoded.rows_shape
    layout = Interleaved(fmt.bits, fmt.group_size)
    zero = encoded.zero_point
    if zero is not None:
        zero = layout.pack_groups(zero.float() - (1 << (fmt.bits - 1)))
    group = min(fmt.group_size or length, length)
    scale = layout.pack_groups(encoded.scale.float())
    return PackedAffine(
        layout.pack(encoded.codes()), scale, zero, rows, length, layout.width, group
    )


def why_not(encoded: Encoded, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot take this weight with activations of `dtype`; None if it can."""
    fmt = encoded.format
    if not isinstance(fmt, AffineInt):
        return f"{fmt.name} is not an affine integer format"
    if len(encoded.shape) != 2:
        return f"it is a stack of matrices {list(encoded.shape)}"
    if dtype not in _FLOATS:
        return f"the activations are {dtype}, and the kernel computes in float32"
    if encoded.scale.dtype == torch.float64:
        return "its scales are float64, and the kernel computes in float32"
    if encoded.scale.device.type != "cpu":
        return f"it lies on {encoded.scale.device}, and the kernel runs on the CPU"
    largest = encoded.scale.abs().max().double().item() * (1 << fmt.bits)
    if not largest < torch.finfo(torch.float32).max:
        return "its largest values would pass the largest float32"
    built = native.library(SOURCE)
    return built if isinstance(built, str) else None


def linear_affine_twin(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    rows: int,
    length: int,
    width: int,
    group: int,
) -> Tensor:
    """The kernel in plain torch: x [..., length] to [..., rows], in x's dtype.

    Any floating dtype: a float64 x computes in float64.
    """
    work = x if x.dtype in (torch.float32, torch.float64) else x.float()
    weight = decoded(codes, scale, zero, rows, length, width, group).to(work.dtype)
    bias = None if bias is None else bias.to(work.dtype)
    return torch.nn.functional.linear(work, weight, bias).to(x.dtype)


def decoded(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rows: int,
    length: int,
    width: int,
    group: int,
) -> Tensor:
    """The weight [rows, length] that the packed parts stand for, float32."""
    layout = Interleaved(width, group)
    steps = layout.unpack(codes, rows, length).float() - (1 << (width - 1))
    place = torch.arange(length, device=codes.device) // group
    if zero is not None:
        steps -= layout.unpack_groups(zero, rows)[:, place]
    return steps * layout.unpack_groups(scale, rows)[:, place]


def _launch(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    rows: int,
    length: int,
    width: int,
    group: int,
) -> Tensor:
    work = x.contiguous() if x.dtype == torch.float32 else x.float().contiguous()
    if bias is not None and not (bias.dtype == torch.float32 and bias.is_contiguous()):
        bias = bias.float().contiguous()
    out = torch.empty((*x.shape[:-1], rows), dtype=torch.float32)
    failed = _function()(
        work.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.numel() // length,
        rows,
        length,
        group,
        codes.stride(0),
        width,
        0,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a product with {x.numel() // length} tokens")
    return out if x.dtype == torch.float32 else out.to(x.dtype)


_found: list[ctypes._NamedFuncPointer] = []


def _function() -> ctypes._NamedFuncPointer:
    if not _found:
        built = native.library(SOURCE)
        assert isinstance(built, ctypes.CDLL), built
        function = built.planish_linear_affine
        function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 8
        _found.append(function)
    return _found[0]


def cost(tokens: int, rows: int, length: int, width: int, group: int, zeros: bool) -> Cost:
    """Codes, scales and zero points once; x and y once."""
    groups = -(-length // group)
    weight = rows * (length * width // 8 + 4 * groups * (1 + zeros))
    return Cost(weight + 4 * tokens * (rows + length), 2 * tokens * rows * length)


_LIBRARY = torch.library.Library("planish", "FRAGMENT")
_LIBRARY.define(
    "linear_affine(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, "
    "int rows, int length, int width, int group) -> Tensor"
)
_LIBRARY.impl("linear_affine", _launch, "CPU")


def _fake(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None,
          rows: int, length: int, width: int, group: int) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], rows))


torch.library.register_fake("planish::linear_affine", _fake, lib=_LIBRARY)

SPEC = KernelSpec(
    name="linear_affine",
    device="cpu",
    serves="linear layers on affine integer weights of 2 to 8 bits, any group size",
    why_not=why_not,
    cost=cost,
    twin=linear_affine_twin,
)
