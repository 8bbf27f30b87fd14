"""Problems for the kernel `linear_int`: small ones with numbers, real ones with shapes alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ir.gpu_layouts import FieldWords
from .launch import Config
from .linear_dense_cases import BRAIN, FULL, HALF, TF32, meta, operands
from .triton_spec import Arguments, Case, Form

SMALL = Config({"BM": 32, "BN": 64, "TILES": 8}, 4, 2)
LARGE = Config({"BM": 64, "BN": 64, "TILES": 8}, 4, 3)
WIDE = Config({"BM": 128, "BN": 128, "TILES": 8}, 8, 3)
SPLIT = Config({"BM": 8, "BN": 64}, 4, 3)
SIXTEEN = Config({"BM": 16, "BN": 64}, 4, 3)


def _make(
    bits: int,
    lead: tuple[int, ...],
    width: int,
    length: int,
    group: int,
    dtype: torch.dtype,
    zeros: bool = False,
    run: int = 32,
    names: str = "",
    activation: str = "none",
    scale: float = 1.0,
    size: float = 1.0,
    scale_dtype: torch.dtype | None = None,
    padding: int = 0,
    precision: str = "ieee",
) -> Callable[[torch.Generator], Arguments]:
    def make(generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        codes = torch.randint(0, 1 << bits, (width, length), generator=generator)
        groups = -(-length // group)
        zero = torch.randint(0, 1 << bits, (groups, width), generator=generator)
        steps = random(groups, width).mul(scale * length**-0.5 / (1 << (bits - 1)))
        x = random(*lead, length + padding).mul(size).to(dtype)[..., :length]
        return {
            "x": x,
            "words": FieldWords(bits, run).pack(codes.to(torch.uint8)),
            "scale": steps.to(scale_dtype or dtype),
            "zero": zero.to(torch.uint8) if zeros else None,
            "bits": bits,
            "group": group,
            "activation": activation,
            "precision": precision,
            **operands(random, (*lead, width), names, dtype),
        }

    return make


CASES = (
    Case("int4 f16, ragged, groups of 32", _make(4, (37,), 75, 200, 32, HALF, names="b"), LARGE),
    Case("int4 f16, zeros, split", _make(4, (5,), 70, 264, 64, HALF, True, names="br"), SPLIT),
    Case("int4 bf16, groups of 128, 8 warps", _make(4, (70,), 130, 264, 128, BRAIN), WIDE),
    Case("int4 bf16, zeros, 16 rows", _make(4, (2, 8), 66, 136, 64, BRAIN, True), SIXTEEN),
    Case("int4 f32", _make(4, (20,), 40, 72, 16, FULL, True, 16, scale_dtype=HALF), SMALL),
    Case(
        "int4 f32 tf32, split",
        _make(4, (3,), 40, 136, 136, FULL, precision="tf32"),
        SIXTEEN,
        TF32,
    ),
    Case("int4 f16, groups of 48", _make(4, (33,), 40, 100, 48, HALF, True, 16), SMALL),
    Case("int4 f16, a scale a channel", _make(4, (1,), 70, 392, 392, HALF, names="g"), SPLIT),
    Case("int8 f16", _make(8, (33,), 70, 104, 32, HALF, activation="silu"), LARGE),
    Case("int8 bf16, zeros, a scale a channel", _make(8, (1,), 70, 136, 136, BRAIN, True), SPLIT),
    Case("int2 f16, zeros", _make(2, (33,), 40, 300, 64, HALF, True), SMALL),
    Case("int2 bf16, groups of 16, split", _make(2, (3,), 40, 136, 16, BRAIN, True, 16), SPLIT),
    Case("int3 f16, split", _make(3, (3,), 40, 600, 128, HALF), SPLIT),
    Case("int3 bf16, zeros, groups of 16", _make(3, (20,), 40, 264, 16, BRAIN, True, 16), SMALL),
    Case("odd length, rows apart", _make(4, (9,), 33, 71, 32, HALF, padding=3), SIXTEEN),
    Case(
        "scales of 2^-30",
        _make(4, (3,), 40, 136, 32, BRAIN, scale=2.0**-30, scale_dtype=FULL),
        SPLIT,
    ),
    Case(
        "f16 with weights beyond its range",
        _make(4, (3,), 40, 136, 32, HALF, scale=2.0**24, size=2.0**-12, scale_dtype=FULL),
        SPLIT,
    ),
    Case("no rows", _make(4, (0, 2), 40, 72, 32, HALF), SMALL),
)


def _form(
    height: int, width: int, length: int, bits: int, group: int, dtype: torch.dtype, zeros: bool
):
    def make() -> Arguments:
        layout, groups = FieldWords(bits, 32), -(-length // group)
        words = (layout.blocks(length), layout.planes, width, 32)
        return {
            "x": meta(height, length, dtype=dtype),
            "words": meta(*words, dtype=torch.int16),
            "scale": meta(groups, width, dtype=dtype),
            "zero": meta(groups, width, dtype=torch.uint8) if zeros else None,
            "bits": bits,
            "group": group,
            "bias": meta(width, dtype=dtype),
        }

    return make


FORMS = (
    Form("int4 g128 1 x 4096 x 4096 f16", _form(1, 4096, 4096, 4, 128, HALF, False), "mma"),
    Form(
        "int4 g64 zeros 16 x 11008 x 4096 bf16", _form(16, 11008, 4096, 4, 64, BRAIN, True), "mma"
    ),
    Form(
        "int8 channel 2048 x 4096 x 11008 bf16",
        _form(2048, 4096, 11008, 8, 11008, BRAIN, False),
        "mma",
    ),
    Form("int3 g128 2048 x 4096 x 4096 f16", _form(2048, 4096, 4096, 3, 128, HALF, False), "mma"),
    Form("int2 g64 zeros 16 x 4096 x 4096 f16", _form(16, 4096, 4096, 2, 64, HALF, True), "mma"),
)
