"""Configurations and problems of the kernel `linear_mx`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import Config
from .linear_dense_cases import meta, operands
from .microscaling import BLOCKS, blocks_encoded
from .triton_spec import Arguments, Case, Form

HALF, BRAIN = torch.float16, torch.bfloat16

CONFIGS = (
    Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 3, ("sm_8", "sm_9", "sm_1")),
    Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 3, ("sm_",)),
    Config({"BM": 64, "BN": 64, "BK": 32, "GROUP": 8}, 4, 2, ("gfx",)),
    Config({"BM": 16, "BN": 64, "BK": 128}, 4, 3, ("sm_",)),
    Config({"BM": 16, "BN": 64, "BK": 64}, 4, 2, ("gfx",)),
)

TILED = Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 3)
SPLIT = Config({"BM": 16, "BN": 64, "BK": 64}, 4, 3)


def _make(
    lead: tuple[int, ...],
    width: int,
    length: int,
    dtype: torch.dtype,
    format: str,
    names: str = "",
    activation: str = "none",
    *,
    padding: int = 0,
    broken: bool = False,
) -> Callable[[torch.Generator], Arguments]:
    """padding: columns between the rows of x; broken: a block's scale is NaN, another's least."""

    def make(generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        codes, scales = blocks_encoded(random(width, length).mul(length**-0.5), format)
        if broken:
            scales[3, 0], scales[4, :] = 255, 0
        return {
            "x": random(*lead, length + padding).to(dtype)[..., :length],
            "weight": codes,
            "scales": scales,
            "whole": torch.full((1,), 0.75) if format == "nvfp4" else None,
            "activation": activation,
            "format": format,
            **operands(random, (*lead, width), names, dtype),
        }

    return make


CASES = (
    Case("mxfp4 bf16, ragged", _make((70,), 75, 96, BRAIN, "mxfp4", "b", "silu"), TILED),
    Case("mxfp4 f16, short block", _make((2, 9), 40, 72, HALF, "mxfp4", "gr"), TILED),
    Case("mxfp8 bf16, short block", _make((20,), 66, 37, BRAIN, "mxfp8"), TILED),
    Case("mxfp8 f16", _make((33,), 40, 128, HALF, "mxfp8", "b", padding=16), TILED),
    Case("nvfp4 bf16", _make((20,), 70, 80, BRAIN, "nvfp4", "br", "gelu"), TILED),
    Case("nvfp4 f16", _make((17,), 40, 96, HALF, "nvfp4"), TILED),
    Case("mxfp4 bf16, scales 255 and 0", _make((5,), 40, 64, BRAIN, "mxfp4", broken=True), TILED),
    Case("mxfp4 bf16, 8 warps", _make((130,), 136, 128, BRAIN, "mxfp4", "b"), CONFIGS[0]),
    Case("split mxfp4 f16, one row", _make((1,), 70, 224, HALF, "mxfp4", "bgr"), SPLIT),
    Case("split nvfp4 bf16, 9 rows", _make((3, 3), 66, 136, BRAIN, "nvfp4"), SPLIT),
    Case("split mxfp8 bf16, 16 rows", _make((16,), 40, 136, BRAIN, "mxfp8", "r"), SPLIT),
    Case("no rows", _make((0, 3), 40, 64, HALF, "mxfp4"), TILED),
    Case("no rows, split", _make((0,), 40, 64, HALF, "nvfp4")),
)


def _form(height: int, width: int, length: int, dtype: torch.dtype, format: str):
    def make() -> Arguments:
        eight = format == "mxfp8"
        blocks = -(-length // BLOCKS[format])
        fp8, byte = torch.float8_e4m3fn, torch.uint8
        return {
            "x": meta(height, length, dtype=dtype),
            "weight": meta(width, length // (2 - eight), dtype=fp8 if eight else byte),
            "scales": meta(width, blocks, dtype=fp8 if format == "nvfp4" else byte),
            "whole": meta(1, dtype=torch.float32) if format == "nvfp4" else None,
            "bias": meta(width, dtype=dtype),
            "format": format,
        }

    return make


FORMS = (
    Form("mxfp4 2048 x 11008 x 4096 bf16", _form(2048, 11008, 4096, BRAIN, "mxfp4"), "mma"),
    Form("nvfp4 1 x 4096 x 4096 f16", _form(1, 4096, 4096, HALF, "nvfp4"), "mma"),
    Form("mxfp8 100 x 4096 x 4096 bf16", _form(100, 4096, 4096, BRAIN, "mxfp8"), "mma"),
)
