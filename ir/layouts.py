"""Packed storage layouts for integer codes, as invertible pairs `pack` and `unpack`.

Codes are uint8 tensors in their logical shape; what is stored may be padded, so `unpack` takes
the logical shape (or its last length) from whoever knows it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UnsupportedGroupSize, UnsupportedShape, WrongOption


@dataclass(frozen=True)
class BitPacked:
    """Codes of `bits` bits (1 to 8) side by side along the last axis, lowest bits first.

    Code i occupies bits [i * bits, (i + 1) * bits) of its row, counted from the lowest bit of the
    row's first byte; the row's last byte is filled with zeros.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise WrongOption("bits out of range", expected="1 to 8", found=str(self.bits))

    def stored(self, length: int) -> int:
        """Bytes of a row of `length` codes."""
        return -(-length * self.bits // 8)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [..., length], each below 2^bits, to uint8 [..., stored(length)]."""
        if self.bits == 8:
            return codes.contiguous()
        length, per = codes.shape[-1], self._codes_in_word
        if missing := -length % per:
            codes = torch.nn.functional.pad(codes, (0, missing))
        words = codes.unflatten(-1, (-1, per))
        packed = self._as_bytes(words) if per < 8 or self.bits == 1 else self._as_words(words)
        return packed[..., : self.stored(length)].contiguous()

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """uint8 [..., stored(length)] to uint8 [..., length]: the inverse of `pack`."""
        if self.bits == 8:
            return packed.contiguous()
        per, mask = self._codes_in_word, (1 << self.bits) - 1
        words = packed
        if per == 8 and self.bits > 1:
            missing = -packed.shape[-1] % self.bits
            words = torch.nn.functional.pad(packed, (0, missing)).unflatten(-1, (-1, self.bits))
            words = torch.nn.functional.pad(words, (0, 8 - self.bits)).view(torch.int64).squeeze(-1)
        codes = torch.empty((*words.shape, per), dtype=torch.uint8, device=packed.device)
        for i in range(per):
            codes[..., i] = (words >> (i * self.bits)) & mask
        return codes.flatten(-2)[..., :length].contiguous()

    @property
    def _codes_in_word(self) -> int:
        """A word is the shortest run of codes that ends on a byte, or 8 codes."""
        return 8 // self.bits if 8 % self.bits == 0 else 8

    def _as_bytes(self, words: Tensor) -> Tensor:
        """One byte a word: widths 1, 2 and 4."""
        if self.bits == 4 and words.is_contiguous() and sys.byteorder == "little":
            pairs = words.view(torch.int16).squeeze(-1)  # both codes at once, five times as fast
            return (pairs | (pairs >> 4)).to(torch.uint8)
        packed = words[..., 0].clone()
        for i in range(1, words.shape[-1]):
            packed |= words[..., i] << (i * self.bits)
        return packed

    def _as_words(self, words: Tensor) -> Tensor:
        """`bits` bytes for 8 codes: the other widths, through a 64-bit integer (little-endian)."""
        packed = words[..., 0].to(torch.int64)
        for i in range(1, 8):
            packed |= words[..., i].to(torch.int64) << (i * self.bits)
        return packed.unsqueeze(-1).view(torch.uint8)[..., : self.bits].flatten(-2)


@dataclass(frozen=True)
class TritPacked:
    """Codes 0, 1 and 2, five a byte along the last axis: 1.6 bits each.

    A byte is the sum of code i times 3^i; the row's last byte is filled with zeros.
    """

    def stored(self, length: int) -> int:
        """Bytes of a row of `length` codes."""
        return -(-length // 5)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [..., length] to uint8 [..., stored(length)]."""
        padded = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 5)).unflatten(-1, (-1, 5))
        packed = padded[..., 4]
        for i in (3, 2, 1, 0):
            packed = packed * 3 + padded[..., i]
        return packed.contiguous()

    def unpack(self, packed: Tensor, length: int) -> Tensor:
        """The inverse of `pack`."""
        codes = torch.empty((*packed.shape, 5), dtype=torch.uint8, device=packed.device)
        rest = packed
        for i in range(5):
            codes[..., i] = rest % 3
            rest = rest // 3
        return codes.flatten(-2)[..., :length].contiguous()


def widen(codes: Tensor, bits: int, to_bits: int) -> Tensor:
    """Codes (or zero points) of a narrow width as codes of a wider one with the same values.

    The middle of the range, which a symmetric format takes for zero, moves to the middle.
    """
    return codes + ((1 << (to_bits - 1)) - (1 << (bits - 1)))


def spread(per_group: Tensor, group_size: int | None, block_size: int, length: int) -> Tensor:
    """Repeat scales or zero points [N, groups] for blocks that divide the groups: [N, blocks].

    A format with one scale a channel (group_size None) is served by any block size.
    """
    blocks = -(-length // block_size)
    if group_size is None or per_group.shape[1] == 1:
        return per_group.expand(-1, blocks).contiguous()
    if group_size % block_size:
        raise UnsupportedGroupSize(
            "blocks must divide the format's groups",
            expected=f"a group size that is a multiple of {block_size}",
            found=str(group_size),
            fix="quantize with another group size, or with one scale a channel (None)",
        )
    return per_group.repeat_interleave(group_size // block_size, dim=1)[:, :blocks].contiguous()


@dataclass(frozen=True)
class MatMulNBitsLayout:
    """The weight of ONNX Runtime's com.microsoft MatMulNBits: y = x @ w.T, w [N, K].

    The CPU provider of onnxruntime 1.31 runs 2, 4 and 8 bits with blocks of 16, 32, 64, 128 or
    256 and any N and K; other widths are widened (`widen`). Within a block codes lie as
    `BitPacked` has them, and the last block is filled with zeros. The operator's scales are
    [N, blocks] in the dtype of x; its zero points, if any, `pack_zero_points`; without them zero
    is 2^(bits-1), as in a symmetric format.
    """

    bits: int
    block_size: int

    def __post_init__(self) -> None:
        if self.bits not in (2, 4, 8):
            raise WrongOption(
                "MatMulNBits does not run this width",
                expected="2, 4 or 8 bits",
                found=str(self.bits),
                fix="widen the codes to the next width",
            )
        if self.block_size not in (16, 32, 64, 128, 256):
            raise UnsupportedGroupSize(
                "MatMulNBits does not run this block size",
                expected="16, 32, 64, 128 or 256",
                found=str(self.block_size),
                fix="choose a group size that one of these divides, or one scale a channel (None)",
            )

    @classmethod
    def serving(cls, bits: int, group_size: int | None, length: int) -> MatMulNBitsLayout:
        """The layout with the widest blocks for a format's width and groups along K = length.

        One scale a channel takes the widest block up to 128 (wider ones lack fast 2-bit kernels)
        that divides K, else 32, with the scale repeated. Raises UnsupportedGroupSize.
        """
        width = next(w for w in (2, 4, 8) if w >= bits)
        if group_size is None or group_size >= length:
            return cls(width, next((b for b in (128, 64) if length % b == 0), 32))
        return cls(width, next((b for b in (256, 128, 64, 32) if group_size % b == 0), 16))

    def blocks(self, length: int) -> int:
        return -(-length // self.block_size)

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [N, K] to uint8 [N, blocks, block_size * bits / 8]."""
        missing = -codes.shape[-1] % self.block_size
        padded = torch.nn.functional.pad(codes, (0, missing))
        return BitPacked(self.bits).pack(padded.unflatten(-1, (-1, self.block_size)))

    def unpack(self, stored: Tensor, length: int) -> Tensor:
        """The inverse of `pack`; length is K."""
        return BitPacked(self.bits).unpack(stored, self.block_size).flatten(-2)[..., :length]

    def pack_zero_points(self, zero_points: Tensor) -> Tensor:
        """uint8 [N, blocks] to uint8 [N, ceil(blocks * bits / 8)]."""
        return BitPacked(self.bits).pack(zero_points)

    def unpack_zero_points(self, stored: Tensor, length: int) -> Tensor:
        """The inverse of `pack_zero_points`; length is K."""
        return BitPacked(self.bits).unpack(stored, self.blocks(length))


@dataclass(frozen=True)
class TorchInt8Layout:
    """The weight of torch's `_weight_int8pack_mm(x [M, K], int8 [N, K], scales [N])` on the CPU.

    Symmetric formats of any width with one scale a channel; the scales have x's dtype. Any N, K
    and M in float32 and float16. In bfloat16 the kernel of torch 2.13 reads past the end of a
    row unless K is a multiple of 16 (wrong values or a crash, measured): `runs` says so.
    """

    bits: int = 8

    def runs(self, length: int, dtype: torch.dtype) -> bool:
        """Whether the kernel is safe for K = length and activations of `dtype`."""
        return dtype != torch.bfloat16 or length % 16 == 0

    def pack(self, codes: Tensor) -> Tensor:
        """Unsigned codes uint8 [N, K] to signed int8 [N, K]."""
        return (codes.to(torch.int16) - (1 << (self.bits - 1))).to(torch.int8)

    def unpack(self, stored: Tensor) -> Tensor:
        return (stored.to(torch.int16) + (1 << (self.bits - 1))).to(torch.uint8)


@dataclass(frozen=True)
class TorchInt4Layout:
    """The weight of torch's `_weight_int4pack_mm_for_cpu(x, packed, group_size, scales_zeros)`.

    Groups of 32, 64, 128 or 256 that divide K. N is filled to a multiple of 16 (the kernel's
    outputs [M, padded N] are to be cut). Float32, bfloat16 and float16 activations.

    The bytes depend on the processor (64 rows interleaved with AVX512, 32 with AVX2, else
    pairs of rows): pack where the program runs, never store them in a file.
    """

    group_size: int

    def __post_init__(self) -> None:
        if self.group_size not in (32, 64, 128, 256):
            raise UnsupportedGroupSize(
                "torch's int4 CPU kernel does not run this group size",
                expected="32, 64, 128 or 256",
                found=str(self.group_size),
                fix="choose one of these, or 8 bits with one scale a channel",
            )

    def runs(self, length: int) -> bool:
        """Whether K = length is a whole number of groups."""
        return length % self.group_size == 0

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 [N, K], each below 16, to the kernel's uint8 [padded N, K / 2] on this machine."""
        rows, length = codes.shape
        if not self.runs(length):
            raise UnsupportedShape(
                "torch's int4 CPU kernel needs whole groups",
                expected=f"K to be a multiple of {self.group_size}",
                found=f"a weight {[rows, length]}",
                fix="choose a group size that divides K",
            )
        padded = torch.nn.functional.pad(codes, (0, 0, 0, -rows % 16), value=8)
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(padded.to(torch.int32), 1)

    def unpack(self, stored: Tensor, rows: int) -> Tensor:
        """The inverse of `pack` on the same machine: codes uint8 [rows, K]."""
        padded, length = stored.shape[0], 2 * stored.shape[1]
        lanes = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability())
        flat = stored.flatten()
        whole = 0 if lanes is None else padded - padded % lanes
        parts: list[Tensor] = []
        if lanes is not None and whole:
            blocks = flat[: whole * length // 2].view(-1, length, lanes // 2)
            both = torch.cat([blocks & 15, blocks >> 4], dim=-1)
            parts.append(both.transpose(1, 2).reshape(whole, length))
        step = lanes or 32
        for start in range(whole, padded, step):
            count = min(step, padded - start)
            block = flat[start * length // 2 : (start + count) * length // 2]
            block = block.view(length, count // 2)
            pairs = torch.stack([block & 15, block >> 4], dim=-1).view(length, count)
            parts.append(pairs.t())
        return torch.cat(parts)[:rows].contiguous()

    def pack_scales(self, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
        """scale, zero_point [N, groups] to scales and zeros [groups, padded N, 2] in x's dtype.

        The kernel computes (code - 8) * scale + zero, so zero = (8 - zero_point) * scale, which
        is rounded to `dtype`: with zero points, bfloat16 activations cost accuracy.
        """
        scale = torch.nn.functional.pad(scale.double(), (0, 0, 0, -scale.shape[0] % 16))
        zero = torch.zeros_like(scale)
        if zero_point is not None:
            zero[: zero_point.shape[0]] = 8 - zero_point.double()
        return torch.stack([scale, zero * scale], dim=-1).transpose(0, 1).to(dtype).contiguous()

    def unpack_scales(self, stored: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The inverse of `pack_scales`: scale and zero point [rows, groups]; 8 if symmetric."""
        scale, zero = stored.transpose(0, 1)[:rows].unbind(-1)
        step = torch.where(scale == 0, torch.ones_like(scale), scale).double()
        return scale.contiguous(), (8 - torch.round(zero.double() / step)).to(torch.uint8)
