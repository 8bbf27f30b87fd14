"""Problems for flash attention: small ones with numbers, and realistic sizes to be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .launch import Config
from .triton_spec import Arguments, Case, Form

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def problem(
    queries: int = 37,
    keys: int = 53,
    head: int = 64,
    *,
    value: int = 0,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int = 1,
    dtype: torch.dtype = F16,
    extra: Callable[[torch.Generator], dict[str, Any]] | None = None,
    **options: Any,
) -> Callable[[torch.Generator], Arguments]:
    """Arguments laid out as a projection leaves them, [batch, length, heads, head] transposed."""

    def make(generator: torch.Generator) -> Arguments:
        def rows(length: int, count: int, size: int) -> Tensor:
            made = torch.randn(batch, length, count, size, generator=generator)
            return made.to(dtype).transpose(1, 2)

        args: dict[str, Any] = {
            "q": rows(queries, heads, head),
            "k": rows(keys, kv_heads, head),
            "v": rows(keys, kv_heads, value or head),
            "scale": head**-0.5,
        }
        return args | options | (extra(generator) if extra else {})

    return make


def large(
    head: int,
    *,
    value: int = 0,
    dtype: torch.dtype = BF16,
    stored: torch.dtype | None = None,
    queries: int = 4096,
    keys: int = 4096,
    **options: Any,
) -> Callable[[], Arguments]:
    """32 heads on 8 of keys, on the meta device; options that are tuples are (shape, dtype)."""

    def make() -> Arguments:
        def rows(length: int, count: int, size: int, kind: torch.dtype) -> Tensor:
            return torch.empty(1, length, count, size, dtype=kind, device="meta").transpose(1, 2)

        args: dict[str, Any] = {
            "q": rows(queries, 32, head, dtype),
            "k": rows(keys, 8, head, stored or dtype),
            "v": rows(keys, 8, value or head, stored or dtype),
            "scale": head**-0.5,
        }
        for name, option in options.items():
            made = isinstance(option, tuple)
            args[name] = torch.empty(option[0], dtype=option[1], device="meta") if made else option
        return args

    return make


CASES = (
    Case("f16", problem()),
    Case("causal f16", problem(causal=True)),
    Case("causal bf16 80", problem(head=80, dtype=BF16, causal=True)),
    Case("causal f32 window", problem(dtype=F32, causal=True, window=9)),
    Case("real", problem(queries=100, keys=190, causal=True), Config({"BM": 64, "BN": 64})),
)
_STARTS = ((5,), torch.int32)
_SCALES = ((1, 8, 4096), F32)
FORMS = (
    Form("causal f16 64", large(64, dtype=F16, causal=True), "mma"),
    Form("causal bf16 128", large(128, causal=True), "mma"),
    Form("mask of keys f16 80", large(80, dtype=F16, mask=((1, 1, 1, 4096), torch.bool)), "mma"),
    Form("bias f16 96", large(96, dtype=F16, mask=((1, 32, 4096, 4096), F16)), "mma"),
    Form("window, cap bf16 256", large(256, causal=True, window=1024, softcap=50.0), "mma"),
    Form("window, sinks bf16 64", large(64, causal=True, window=128, sinks=((32,), BF16)), "mma"),
    Form(
        "packed bf16 192 and 128",
        large(192, value=128, causal=True, query_starts=_STARTS, key_starts=_STARTS, longest=2048),
        "mma",
    ),
    Form("slopes f16 128", large(128, dtype=F16, causal=True, slopes=((32,), F32)), "mma"),
    Form(
        "blocks bf16 128",
        large(
            128, causal=True, blocks=((1, 1, 32, 32), torch.bool), block_queries=128, block_keys=128
        ),
        "mma",
    ),
    Form(
        "int8 bf16 128",
        large(128, stored=torch.int8, causal=True, k_scale=_SCALES, v_scale=_SCALES),
        "mma",
    ),
    Form(
        "float8 f16 128",
        large(
            128,
            dtype=F16,
            stored=torch.float8_e4m3fn,
            causal=True,
            k_scale=((), F32),
            v_scale=((), F32),
        ),
        "mma",
        archs=("sm_89", "sm_9", "sm_1", "gfx942"),
    ),
    Form("causal f32 64", large(64, dtype=F32, causal=True)),
    Form("causal tf32 64", large(64, dtype=F32, causal=True, tf32=True), "mma", archs=("sm_",)),
    Form("one query bf16 128", large(128, queries=1, causal=True), "mma"),
)
