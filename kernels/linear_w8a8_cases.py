"""Configurations and problems of the kernel `linear_w8a8`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch import Config
from .linear_dense_cases import meta, operands
from .triton_spec import Arguments, Case, Form

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

CONFIGS = (
    Config({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, 8, 3, ("sm_80", "sm_9", "sm_10")),
    Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 4, ("sm_89", "sm_12")),
    Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 4, ("sm_",)),
    Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 2, ("gfx9",)),
    Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 2, ("gfx",)),
    Config({"BM": 16, "BN": 64, "BK": 128}, 4, 4, ("sm_",)),
    Config({"BM": 16, "BN": 64, "BK": 128}, 4, 2, ("gfx",)),
)

TILED = Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 3)
SPLIT = Config({"BM": 16, "BN": 64, "BK": 64}, 4, 3)
WIDE = Config({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, 8, 3)


def int8_weight(
    random: Callable[..., Tensor], width: int, length: int, padding: int = 0
) -> tuple[Tensor, Tensor]:
    """(codes [N, K], scales [N]) of a random weight; padding: columns between its rows."""
    weight = random(width, length).mul(length**-0.5)
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    return torch.nn.functional.pad(codes, (0, padding))[:, :length], scale


def _make(
    lead: tuple[int, ...],
    width: int,
    length: int,
    dtype: torch.dtype,
    names: str = "",
    activation: str = "none",
    *,
    given: str = "",
    asymmetric: bool = False,
    padding: int = 0,
    scale: float = 1.0,
    outlier: float = 1.0,
) -> Callable[[torch.Generator], Arguments]:
    """given: "static" scales, or "codes" with a scale a token. The second row
    is zero; outlier: a value of the third row."""

    def make(generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        codes, steps = int8_weight(random, width, length, padding)
        x = random(*lead, length + padding).mul(scale) + asymmetric
        rows = x.flatten(0, -2)
        rows[1:2] = 0.0
        rows[2:3, :1] *= outlier
        made = {
            "x": x.to(dtype)[..., :length],
            "weight": codes,
            "weight_scale": steps if given != "static" else steps[:1],
            "activation": activation,
            "weight_sums": codes.sum(1, dtype=torch.int32) if asymmetric else None,
            **operands(random, (*lead, width), names, dtype),
        }
        tokens = rows.shape[0] if given == "codes" else 1
        if given:
            made["x_scale"] = torch.rand(tokens, generator=generator) * 0.01 + 0.01
            zeros = torch.randint(-40, 40, (tokens,), generator=generator, dtype=torch.int32)
            made["x_zero"] = zeros if asymmetric else None
        if given == "codes":
            made["dtype"] = dtype
            made["x"] = torch.randint(-128, 128, x.shape, generator=generator).to(torch.int8)[
                ..., :length
            ]
        return made

    return make


CASES = (
    Case("tiled f16, ragged, bias and silu", _make((70,), 75, 100, HALF, "b", "silu"), TILED),
    Case("tiled bf16, gate and residual", _make((2, 35), 66, 96, BRAIN, "gr"), TILED),
    Case("tiled f32, asymmetric", _make((20,), 40, 80, FULL, "b", asymmetric=True), TILED),
    Case("tiled f16, static", _make((66,), 72, 72, HALF, "br", "relu", given="static"), TILED),
    Case(
        "tiled bf16, static, asymmetric",
        _make((17,), 33, 37, BRAIN, given="static", asymmetric=True),
        TILED,
    ),
    Case("tiled codes to f32", _make((66,), 72, 112, FULL, given="codes", padding=16), TILED),
    Case(
        "tiled codes to f16, asymmetric",
        _make((2, 9), 40, 64, HALF, "b", given="codes", asymmetric=True),
        TILED,
    ),
    Case("tiled bf16, 8 warps", _make((130,), 136, 144, BRAIN, "bgr", "gelu_tanh"), WIDE),
    Case("tiled f32, outliers", _make((5,), 40, 80, FULL, outlier=1e4), TILED),
    Case("split f16, one row", _make((1,), 70, 200, HALF, "bgr", "quick_gelu"), SPLIT),
    Case("split bf16, 16 rows, asymmetric", _make((4, 4), 66, 136, BRAIN, asymmetric=True), SPLIT),
    Case("split f16, odd length", _make((3,), 40, 139, HALF), SPLIT),
    Case("split codes, 3 rows", _make((3,), 40, 136, FULL, "r", given="codes"), SPLIT),
    Case("no rows", _make((0, 3), 40, 64, HALF), TILED),
    Case("no rows, split", _make((0,), 40, 64, HALF)),
    Case("f16 results beyond its range", _make((20,), 40, 64, HALF, "g", scale=1e4), TILED),
)


def _form(height: int, width: int, length: int, dtype: torch.dtype, asymmetric: bool = False):
    def make() -> Arguments:
        return {
            "x": meta(height, length, dtype=dtype),
            "weight": meta(width, length, dtype=torch.int8),
            "weight_scale": meta(width, dtype=FULL),
            "weight_sums": meta(width, dtype=torch.int32) if asymmetric else None,
            "bias": meta(width, dtype=dtype),
            "residual": meta(height, width, dtype=dtype),
            "activation": "silu",
        }

    return make


FORMS = (
    Form("1 x 4096 x 11008 bf16", _form(1, 4096, 11008, BRAIN), "int8 mma"),
    Form("2048 x 11008 x 4096 f16", _form(2048, 11008, 4096, HALF), "int8 mma"),
    Form("100 x 4096 x 4099 f16", _form(100, 4096, 4099, HALF), "int8 mma"),
    Form("512 x 4096 x 4096 bf16, asymmetric", _form(512, 4096, 4096, BRAIN, True), "int8 mma"),
)
