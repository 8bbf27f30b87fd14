"""Problems for the kernel `linear_dense`: small ones with numbers, real ones with shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .launch import Config
from .triton_spec import Arguments, Case, Form

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
TF32 = 2.0**-11  # the products' operands keep 10 bits and are rounded to nearest

TILED = Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 3)
SPLIT = Config({"BM": 16, "BN": 64, "BK": 64}, 4, 3)
WIDE = Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 3)


def operands(
    random: Callable[..., Tensor], shape: tuple[int, ...], names: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Standard epilogue arguments for a result of `shape`, those whose initials are in `names`."""
    made: dict[str, Any] = {}
    if "b" in names:
        made["bias"] = random(shape[-1]).to(dtype)
    if "g" in names:
        made["gate"] = random(*shape).to(dtype)
    if "r" in names:
        made["residual"] = random(*shape).to(dtype)
    return made


def _make(
    lead: tuple[int, ...],
    width: int,
    length: int,
    dtype: torch.dtype,
    names: str = "",
    activation: str = "none",
    scale: float = 1.0,
    precision: str = "ieee",
    padding: int = 0,
) -> Callable[[torch.Generator], Arguments]:
    """padding: columns that lie between the rows of x and of the weight."""

    def make(generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        x = random(*lead, length + padding).mul(scale).to(dtype)[..., :length]
        weight = random(width, length + padding).mul(length**-0.5).to(dtype)[:, :length]
        extra = operands(random, (*lead, width), names, dtype)
        return {"x": x, "weight": weight, "activation": activation, "precision": precision, **extra}

    return make


def _turned(generator: torch.Generator) -> Arguments:
    x = torch.randn(72, 20, generator=generator).half().t()
    return {"x": x, "weight": torch.randn(40, 72, generator=generator).half()}


CASES = (
    Case("tiled f16, ragged, bias and silu", _make((70,), 75, 88, HALF, "b", "silu"), TILED),
    Case("tiled bf16, gate and residual", _make((2, 35), 66, 72, BRAIN, "gr"), TILED),
    Case("tiled f32 ieee", _make((20,), 40, 72, FULL, "br", "gelu"), TILED),
    Case("tiled f32 tf32", _make((66,), 72, 72, FULL, precision="tf32"), TILED, TF32),
    Case("tiled f16, odd length", _make((17,), 33, 37, HALF, "b"), TILED),
    Case("tiled bf16, 8 warps", _make((130,), 136, 72, BRAIN, "bgr", "gelu_tanh"), WIDE),
    Case("rows apart", _make((33,), 40, 64, HALF, padding=16), TILED),
    Case("x transposed", _turned, TILED),
    Case("split f16, one row", _make((1,), 70, 200, HALF, "bgr", "quick_gelu"), SPLIT),
    Case("split bf16, 16 rows", _make((4, 4), 66, 136, BRAIN, "b", "relu"), SPLIT),
    Case("split f32, 3 rows", _make((3,), 40, 136, FULL, "r"), SPLIT),
    Case("split f32 tf32, 3 rows", _make((3,), 40, 136, FULL, precision="tf32"), SPLIT, TF32),
    Case("no rows", _make((0, 3), 40, 64, HALF), TILED),
    Case("no rows, split", _make((0,), 40, 64, HALF)),
    Case("f16 results beyond its range", _make((20,), 40, 64, HALF, "g", scale=1e4), TILED),
    Case("f16 subnormal inputs", _make((20,), 40, 64, HALF, scale=2.0**-18), TILED),
)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _form(height: int, width: int, length: int, dtype: torch.dtype, precision: str = "ieee"):
    def make() -> Arguments:
        return {
            "x": meta(height, length, dtype=dtype),
            "weight": meta(width, length, dtype=dtype),
            "bias": meta(width, dtype=dtype),
            "residual": meta(height, width, dtype=dtype),
            "activation": "silu",
            "precision": precision,
        }

    return make


FORMS = (
    Form("1 x 4096 x 11008 bf16", _form(1, 4096, 11008, BRAIN), "mma"),
    Form("2048 x 11008 x 4096 f16", _form(2048, 11008, 4096, HALF), "mma"),
    Form("2048 x 4096 x 4096 f32 tf32", _form(2048, 4096, 4096, FULL, "tf32"), "mma", ("sm_",)),
    Form("16 x 4096 x 4096 f32", _form(16, 4096, 4096, FULL)),
    Form("100 x 4096 x 4099 f16", _form(100, 4096, 4099, HALF), "mma"),
)
