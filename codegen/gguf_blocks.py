"""Which blocks of a GGUF file hold an encoded weight bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ir.encoded import Encoded
from ..ir.errors import UnsupportedByTarget
from ..ir.format_offset import AffineOffset
from ..ir.format_two_four_codes import with_zeros
from ..ir.formats import AffineInt
from ..ir.layout_gguf import LAYOUTS, GgufLayout
from ..ir.layouts import spread, widen

_Q4_0, _Q4_1, _Q8_0 = 2, 3, 8
_BLOCK = 32


@dataclass(frozen=True)
class Block:
    """kind: ggml's number of the type. bits, group_size: of the entry."""

    kind: int
    entry: Encoded
    bits: int
    group_size: int | None

    @property
    def layout(self) -> GgufLayout:
        return LAYOUTS[self.kind]

    def pack(self) -> Tensor:
        """uint8 [out, bytes], rows in the model's order."""
        length = self.entry.rows_shape[1]
        wide = 8 if self.kind == _Q8_0 else 4
        codes = self.entry.codes()
        if self.kind != _Q4_1:
            codes = widen(codes, self.bits, wide)
        per_block = [
            spread(self.entry.parts[name], self.group_size, _BLOCK, length).half()
            for name in ("scale", "offset")
            if name in self.entry.parts
        ]
        return self.layout.pack(codes, *per_block)


def gguf_block(name: str, entry: Encoded) -> Block:
    """The blocks for a weight [out, in]; raises UnsupportedByTarget, which says what would fit."""
    entry = with_zeros(entry)
    fmt = entry.format
    length = entry.rows_shape[1]
    kind = None
    if isinstance(fmt, AffineInt) and fmt.symmetric:
        kind = _Q4_0 if fmt.bits <= 4 else _Q8_0
    elif isinstance(fmt, AffineOffset) and not fmt.k and fmt.bits <= 4:
        kind = _Q4_1
    size = getattr(fmt, "group_size", None) or length
    parts = [entry.parts[part] for part in ("scale", "offset") if part in entry.parts]
    if kind is None or length % _BLOCK or size % _BLOCK:
        found = f"{fmt.name} {list(entry.shape)}"
    elif not all(torch.equal(part.half().to(part.dtype), part) for part in parts):
        found = f"{fmt.name}, whose scales are no float16 numbers"
    else:
        group_size: int | None = getattr(fmt, "group_size", None)
        return Block(kind, entry, int(getattr(fmt, "bits", 4)), group_size)
    raise UnsupportedByTarget(
        f"no block of a GGUF file holds the codes of {name}",
        where=name,
        expected="symmetric integers, or offsets of 4 bits, groups of a multiple of 32 with "
        "float16 scales",
        found=found,
        fix="quantize with symmetric=true, group_size=32, scale_dtype=float16",
    )
