"""Configurations and problems of the kernel `linear_llm_int8`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import Config
from .linear_dense_cases import meta, operands
from .linear_w8a8_cases import int8_weight
from .triton_spec import Arguments, Case, Form

HALF, BRAIN = torch.float16, torch.bfloat16

CONFIGS = (
    Config({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, 8, 3, ("sm_80", "sm_9", "sm_10")),
    Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 4, ("sm_89", "sm_12")),
    Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 4, ("sm_",)),
    Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 2, ("gfx9",)),
    Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 2, ("gfx",)),
    Config({"BM": 16, "BN": 64, "BK": 128, "GROUP": 8}, 4, 4, ("sm_",)),
    Config({"BM": 16, "BN": 64, "BK": 64, "GROUP": 8}, 4, 2, ("gfx",)),
)
"""The last that serves an architecture is for up to 16 rows."""

TILED = Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 3)
FLAT = Config({"BM": 16, "BN": 64, "BK": 64, "GROUP": 8}, 4, 3)


def _make(
    lead: tuple[int, ...],
    width: int,
    length: int,
    outliers: int,
    dtype: torch.dtype,
    names: str = "",
    activation: str = "none",
    *,
    padding: int = 0,
) -> Callable[[torch.Generator], Arguments]:
    """Outlier columns are a hundred times the others; the second row is zero."""

    def make(generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        columns = torch.randperm(length, generator=generator)[:outliers].sort().values
        regular = torch.ones(length, dtype=torch.uint8)
        regular[columns] = 0
        x = random(*lead, length + padding)[..., :length]
        x[..., columns] *= 100.0
        x.flatten(0, -2)[1:2] = 0.0
        codes, scale = int8_weight(random, width, length)
        wide = random(width, outliers).mul(length**-0.5)
        return {
            "x": x.to(dtype),
            "weight": codes,
            "weight_scale": scale,
            "outliers": columns.to(torch.int32),
            "outlier_weight": wide.to(dtype),
            "regular": regular,
            "activation": activation,
            **operands(random, (*lead, width), names, dtype),
        }

    return make


CASES = (
    Case("f16, ragged, bias and silu", _make((70,), 75, 100, 5, HALF, "b", "silu"), TILED),
    Case("bf16, many outliers", _make((2, 35), 66, 96, 33, BRAIN, "gr"), TILED),
    Case("f16, no outliers", _make((20,), 40, 80, 0, HALF), TILED),
    Case("bf16, odd length", _make((17,), 33, 37, 3, BRAIN, "b", "relu"), TILED),
    Case("f16, rows apart", _make((5,), 40, 64, 2, HALF, padding=8), TILED),
    Case("bf16, one row", _make((1,), 70, 200, 7, BRAIN, "bgr", "gelu"), FLAT),
    Case("no rows", _make((0, 3), 40, 64, 2, HALF), TILED),
    Case("f16, 8 warps", _make((130,), 136, 144, 18, HALF, "b"), CONFIGS[0]),
)


def _form(height: int, width: int, length: int, outliers: int, dtype: torch.dtype):
    def make() -> Arguments:
        return {
            "x": meta(height, length, dtype=dtype),
            "weight": meta(width, length, dtype=torch.int8),
            "weight_scale": meta(width, dtype=torch.float32),
            "outliers": meta(outliers, dtype=torch.int32),
            "outlier_weight": meta(width, outliers, dtype=dtype),
            "regular": meta(length, dtype=torch.uint8),
            "bias": meta(width, dtype=dtype),
        }

    return make


FORMS = (
    Form("2048 x 11008 x 4096 f16, 32 outliers", _form(2048, 11008, 4096, 32, HALF), "int8 mma"),
    Form("1 x 4096 x 4096 bf16, 6 outliers", _form(1, 4096, 4096, 6, BRAIN), "int8 mma"),
)
