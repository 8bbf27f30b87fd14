"""Problems for the kernel `linear_ternary`: small ones with numbers, real ones with shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ir.gpu_layouts import FieldWords
from .launch import Config
from .linear_dense_cases import BRAIN, FULL, HALF, meta, operands
from .triton_spec import Arguments, Case, Form

SMALL = Config({"BM": 32, "BN": 64, "TILES": 8}, 4, 2)
LARGE = Config({"BM": 64, "BN": 64, "TILES": 8}, 4, 2)
SPLIT = Config({"BM": 8, "BN": 64}, 4, 3)
SIXTEEN = Config({"BM": 16, "BN": 64}, 4, 3)


def _make(
    lead: tuple[int, ...],
    width: int,
    length: int,
    dtype: torch.dtype,
    int8: bool = False,
    names: str = "",
    scale: float = 1.0,
    extreme: bool = False,
) -> Callable[[torch.Generator], Arguments]:
    """extreme: every activation is -127 or 127, every weight of the same sign."""

    def make(generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        codes = torch.randint(0, 3, (width, length), generator=generator).to(torch.uint8)
        x, tokens = random(*lead, length), random(*lead).abs().mul(0.02)
        if extreme:
            codes.fill_(2)
            x = x.sign() * 127
        numbers = x.mul(1 if extreme else 40).round().clamp(-127, 127).to(torch.int8)
        return {
            "x": numbers if int8 else x.to(dtype),
            "words": FieldWords(2, 32).pack(codes),
            "scale": random(1, width).abs().mul(scale * length**-0.5).to(dtype),
            "x_scale": tokens if int8 else None,
            **operands(random, (*lead, width), names, dtype),
        }

    return make


CASES = (
    Case("f16, ragged", _make((35,), 75, 300, HALF, names="b"), LARGE),
    Case("bf16, one row", _make((1,), 70, 264, BRAIN, names="gr"), SPLIT),
    Case("f32", _make((2, 9), 40, 72, FULL), SMALL),
    Case("f16, scales of 2^-14", _make((3,), 40, 264, HALF, scale=2.0**-14), SPLIT),
    Case("int8 to f16, ragged", _make((70,), 75, 300, HALF, True, "b"), LARGE),
    Case("int8 to bf16, one row", _make((1,), 70, 264, BRAIN, True, "r"), SPLIT),
    Case("int8 to f32, 16 rows", _make((4, 4), 40, 544, FULL, True), SIXTEEN),
    Case("int8 at its limits", _make((9,), 40, 272, FULL, True, extreme=True), SMALL),
    Case("int8, odd length", _make((3,), 33, 71, HALF, True), SIXTEEN),
    Case("no rows", _make((0,), 40, 72, HALF, True), SMALL),
)


def _form(height: int, width: int, length: int, dtype: torch.dtype, int8: bool):
    def make() -> Arguments:
        return {
            "x": meta(height, length, dtype=torch.int8 if int8 else dtype),
            "words": meta(FieldWords(2, 32).blocks(length), 1, width, 32, dtype=torch.int16),
            "scale": meta(1, width, dtype=dtype),
            "x_scale": meta(height, dtype=FULL) if int8 else None,
        }

    return make


FORMS = (
    Form("1 x 4096 x 4096 bf16", _form(1, 4096, 4096, BRAIN, False), "mma"),
    Form("2048 x 4096 x 11008 int8", _form(2048, 4096, 11008, BRAIN, True), "int8 mma"),
)
