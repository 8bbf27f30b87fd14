"""Problems for the kernel `linear_codebook`: small ones with numbers, real ones with shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ir.format_mx import E2M1 as FP4
from ..ir.format_nf4 import NF4
from ..ir.gpu_layouts import FieldWords
from .launch import Config
from .linear_dense_cases import BRAIN, FULL, HALF, meta, operands
from .triton_spec import Arguments, Case, Form

SMALL = Config({"BM": 32, "BN": 64, "TILES": 8}, 4, 2)
LARGE = Config({"BM": 64, "BN": 64, "TILES": 8}, 4, 3)
SPLIT = Config({"BM": 8, "BN": 64}, 4, 3)


def _make(
    table: tuple[float, ...] | int,
    lead: tuple[int, ...],
    width: int,
    length: int,
    group: int,
    dtype: torch.dtype,
    double: bool = False,
    each: bool = False,
    names: str = "",
    run: int = 32,
) -> Callable[[torch.Generator], Arguments]:
    """table: its entries, or how many random ones. each: a table for each group and row."""

    def make(generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        groups, entries = -(-length // group), table if isinstance(table, int) else len(table)
        lot = (groups, width) if each else ()
        numbers = random(*lot, entries) if isinstance(table, int) else torch.tensor(table)
        codes = torch.randint(0, entries, (width, length), generator=generator).to(torch.uint8)
        levels = torch.randint(0, 256, (groups, width), generator=generator).to(torch.uint8)
        scale = random(groups, width).abs().mul(length**-0.5)
        coded = {
            "scale_table": torch.linspace(-1, 1, 256),
            "second": random(-(-groups * width // 256)).abs().mul(length**-0.5),
            "offset": torch.tensor([length**-0.5]),
        }
        return {
            "x": random(*lead, length).to(dtype),
            "words": FieldWords(entries.bit_length() - 1, run).pack(codes),
            "scale": levels if double else scale,
            "table": numbers,
            "group": group,
            **(coded if double else {}),
            **operands(random, (*lead, width), names, dtype),
        }

    return make


CASES = (
    Case("nf4 f16, ragged", _make(NF4, (35,), 75, 200, 64, HALF, names="b"), LARGE),
    Case("nf4 bf16, double, split", _make(NF4, (5,), 70, 264, 64, BRAIN, True, names="r"), SPLIT),
    Case("nf4 f32, double", _make(NF4, (2, 9), 300, 72, 64, FULL, True), SMALL),
    Case("fp4 f16, one row", _make(FP4, (1,), 40, 136, 64, HALF), SPLIT),
    Case("16 means a group, f16", _make(16, (3,), 40, 136, 32, HALF, each=True, names="g"), SPLIT),
    Case("256 means bf16, scale a channel", _make(256, (20,), 40, 136, 136, BRAIN), SMALL),
    Case("groups of 16 f16", _make(NF4, (3,), 33, 71, 16, HALF, run=16), SPLIT),
    Case("no rows", _make(NF4, (0,), 40, 64, 64, HALF), SMALL),
)


def _form(height: int, width: int, length: int, dtype: torch.dtype, double: bool, entries: int):
    def make() -> Arguments:
        groups, layout = -(-length // 64), FieldWords(entries.bit_length() - 1, 32)
        coded = {
            "scale_table": meta(256, dtype=FULL),
            "second": meta(-(-groups * width // 256), dtype=FULL),
            "offset": meta(1, dtype=FULL),
        }
        return {
            "x": meta(height, length, dtype=dtype),
            "words": meta(layout.blocks(length), 1, width, 32, dtype=torch.int16),
            "scale": meta(groups, width, dtype=torch.uint8 if double else FULL),
            "table": meta(entries, dtype=FULL),
            "group": 64,
            **(coded if double else {}),
        }

    return make


FORMS = (
    Form("16 entries, double, 1 x 4096 x 4096 f16", _form(1, 4096, 4096, HALF, True, 16), "mma"),
    Form("16 entries 2048 x 11008 x 4096 bf16", _form(2048, 11008, 4096, BRAIN, False, 16), "mma"),
    Form("256 entries 16 x 4096 x 4096 f16", _form(16, 4096, 4096, HALF, False, 256), "mma"),
)
