"""Test problems of the low-rank updates: small ones with numbers, realistic ones without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import Config
from .triton_spec import Arguments, Case, Form


def _problem(
    adapters: Sequence[int],
    *,
    dtype: torch.dtype = torch.float16,
    rank: int = 8,
    sizes: tuple[int, int] = (88, 56),
    count: int = 3,
    grouped: bool = False,
    strided: bool = False,
    big: float = 1.0,
):
    def make(generator: torch.Generator) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        rows = len(adapters)
        both = normal(rows, sum(sizes) + 8).to(dtype)
        x, y = both[:, : sizes[0]], both[:, -sizes[1] :]
        if not strided:
            x, y = x.contiguous(), y.contiguous()
        index = torch.tensor(adapters, dtype=torch.int32)
        args = {
            "y": y * big,
            "x": x,
            "a": normal(count, rank, sizes[0]).mul(sizes[0] ** -0.5).to(dtype),
            "b": normal(count, sizes[1], rank).mul(big).to(dtype),
            "scale": normal(count),
            "adapters": index,
        }
        if grouped:
            args["order"] = torch.argsort(index, stable=True).to(torch.int32)
        return args

    return make


_BF, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32
_SMALL = Config({"BM": 16, "BN": 32, "BK": 32}, num_warps=4, num_stages=2)
_REAL = Config({"BM": 64, "BN": 128, "BK": 64}, num_warps=8, num_stages=3)
_MIXED = (2, -1, 0, 1, 0, 2, 2, -1, 1, 0, 2, 0, 0, 1, 2, -1, 0, 1, 2, 2, 1)

CASES = (
    Case("row f16", _problem((1, -1, 2, 0, 2))),
    Case("row bf16 rank 24, strided", _problem((0, 2), dtype=_BF, rank=24, strided=True)),
    Case("row f32, parts", _problem((1, 0), dtype=_F32, rank=12, sizes=(2056, 20))),
    Case("row, nobody has an adapter", _problem((-1, -1))),
    Case("row f16 of thousands", _problem((2, 1), big=3000.0)),
    Case("grouped f16", _problem(_MIXED, grouped=True), _SMALL),
    Case("grouped bf16 rank 20", _problem(_MIXED, dtype=_BF, rank=20, grouped=True), _SMALL),
    Case("grouped f32, strided", _problem(_MIXED, dtype=_F32, grouped=True, strided=True), _SMALL),
    Case("grouped, no adapters", _problem((-1,) * 5, grouped=True), _SMALL),
    Case(
        "grouped real tiles f16",
        _problem(_MIXED * 4, grouped=True, rank=32, sizes=(328, 136)),
        _REAL,
    ),
    Case(
        "grouped real tiles bf16",
        _problem((1,) * 70, dtype=_BF, grouped=True, rank=64, sizes=(136, 72)),
        _REAL,
    ),
)


def _form(
    rows: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    grouped: bool = False,
    sizes: tuple[int, int] = (4096, 4096),
):
    def make() -> Arguments:
        def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        args = {
            "y": meta(rows, sizes[1]),
            "x": meta(rows, sizes[0]),
            "a": meta(16, rank, sizes[0]),
            "b": meta(16, sizes[1], rank),
            "scale": meta(16, of=_F32),
            "adapters": meta(rows, of=torch.int32),
        }
        return args | ({"order": meta(rows, of=torch.int32)} if grouped else {})

    return make


FORMS = (
    Form("row bf16 32 rows, rank 16", _form(32, 16)),
    Form("row f16 8 rows, rank 128", _form(8, 128, dtype=torch.float16)),
    Form("grouped bf16 4096 rows, rank 16", _form(4096, 16, grouped=True), "mma"),
    Form(
        "grouped f16 2048 rows, rank 64", _form(2048, 64, dtype=torch.float16, grouped=True), "mma"
    ),
    Form("grouped bf16 512 rows, rank 128", _form(512, 128, grouped=True), "mma"),
    Form("grouped f32 256 rows, rank 32", _form(256, 32, dtype=_F32, grouped=True)),
)
