"""Problems for the kernel `linear_sparse24`: small ones with numbers, real ones with shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ir.gpu_layouts import TwoOfFour
from .launch import Config
from .linear_dense_cases import BRAIN, FULL, HALF, meta, operands
from .triton_spec import Arguments, Case, Form

TILED = Config({"BM": 64, "BN": 64, "TILES": 8}, 4, 2)
SPLIT = Config({"BM": 16, "BN": 64}, 4, 3)


def pruned(weight: Tensor) -> Tensor:
    """The two largest of every four columns, zeros elsewhere; K a multiple of four or not."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4)).unflatten(1, (-1, 4))
    mask = torch.zeros_like(padded).scatter_(-1, padded.abs().topk(2, -1).indices, 1)
    return (padded * mask).flatten(1)[:, : weight.shape[1]]


def _make(
    lead: tuple[int, ...],
    width: int,
    length: int,
    dtype: torch.dtype,
    names: str = "",
    empty: bool = False,
) -> Callable[[torch.Generator], Arguments]:
    """empty: half of the weight's remaining values are zero too."""

    def make(generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weight = pruned(random(width, length).mul(length**-0.5))
        if empty:
            weight *= random(width, length) > 0
        values, places = TwoOfFour().pack(weight.to(dtype))
        extra = operands(random, (*lead, width), names, dtype)
        return {"x": random(*lead, length).to(dtype), "values": values, "places": places, **extra}

    return make


CASES = (
    Case("f16, ragged", _make((35,), 75, 300, HALF, "b"), TILED),
    Case("bf16, two blocks, gate and residual", _make((3, 22), 70, 512, BRAIN, "gr"), TILED),
    Case("f32", _make((18,), 40, 72, FULL), TILED),
    Case("f16, one row", _make((1,), 70, 264, HALF, "b"), SPLIT),
    Case("bf16, odd length", _make((9,), 33, 71, BRAIN), SPLIT),
    Case("f16, groups with fewer than two", _make((5,), 40, 136, HALF, empty=True), SPLIT),
    Case("no rows", _make((0,), 40, 64, HALF), TILED),
)


def _form(height: int, width: int, length: int, dtype: torch.dtype):
    def make() -> Arguments:
        tiles = TwoOfFour().tiles(length)
        return {
            "x": meta(height, length, dtype=dtype),
            "values": meta(tiles, 2, width, 16, dtype=dtype),
            "places": meta(tiles // 4, 1, width, 16, dtype=torch.int16),
        }

    return make


FORMS = (
    Form("1 x 4096 x 4096 f16", _form(1, 4096, 4096, HALF), "mma"),
    Form("2048 x 4096 x 11008 bf16", _form(2048, 4096, 11008, BRAIN), "mma"),
)
