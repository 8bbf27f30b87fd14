"""Test problems of the attention over caches: small ones with numbers, realistic ones without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.cache_ops import _quantize_cache
from .launch import Config
from .triton_spec import Arguments, Case, Form


def coded(x: Tensor, bits: int, tokens: int, span: int) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes, scale, zero of x [.., heads, tokens, head] in groups of tokens and channels."""
    grouped = x.float().unflatten(3, (-1, span)).unflatten(2, (-1, tokens))
    low, high = grouped.amin((3, 5), True), grouped.amax((3, 5), True)
    scale = (high - low) / ((1 << bits) - 1)
    full = [s.expand_as(grouped).flatten(4, 5).flatten(2, 3) for s in (scale, low)]
    codes = _quantize_cache(x.float(), full[0], full[1], bits)
    return codes, scale.squeeze(5).squeeze(3), low.squeeze(5).squeeze(3)


def _cache(x: Tensor, kind: str, tokens: int, span: int, name: str) -> dict[str, Any]:
    """A cache of the wanted kind as arguments: "f32", "int8", "u4", "e4m3", ..."""
    if kind == "int8":
        scale = x.float().abs().amax(-1, keepdim=True) / 127
        codes = _quantize_cache(x.float(), scale)
        return {name: codes, f"{name}_scale": scale}
    if kind.startswith("u"):
        codes, scale, zero = coded(x, int(kind[1:]), tokens, span)
        return {
            name: codes,
            f"{name}_scale": scale,
            f"{name}_zero": zero,
            f"{name}_bits": int(kind[1:]),
        }
    if kind.startswith("e"):
        dtype = torch.float8_e4m3fn if kind == "e4m3" else torch.float8_e5m2
        return {name: (x * 2).to(dtype), f"{name}_scale": torch.full((1, 1, 1, 1), 0.5)}
    return {name: x.to({"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[kind])}


def _problem(
    lengths: Sequence[int],
    *,
    dtype: torch.dtype = torch.float16,
    heads: tuple[int, int] = (4, 2),
    queries: int = 1,
    head: int = 24,
    value_head: int = 0,
    capacity: int = 48,
    page: int = 0,
    kind: str = "",
    groups: tuple[int, int] = (16, 8),
    big: float = 1.0,
    tail: int = 0,
    extra: Sequence[str] = (),
    **options: Any,
):
    """A maker of arguments. What lies beyond a sequence's end is NaN where the dtype has one."""

    def make(generator: torch.Generator) -> Arguments:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator)

        blocks, tokens = (len(lengths), capacity)
        args: dict[str, Any] = {"lengths": torch.tensor(lengths, dtype=torch.int32)}
        if page:
            per = -(-capacity // page)
            blocks, tokens = len(lengths) * per + 1, page
            order = torch.randperm(blocks, generator=generator)[: len(lengths) * per]
            args["table"] = order.reshape(len(lengths), per).to(torch.int32)
        k = normal(blocks, tokens, heads[1], head).transpose(1, 2) * big
        v = normal(blocks, tokens, heads[1], value_head or head).transpose(1, 2)
        if not page:
            beyond = torch.arange(tokens)[None, :] >= args["lengths"][:, None]
            if not kind:
                k = k.masked_fill(beyond[:, None, :, None], torch.nan)
                v = v.masked_fill(beyond[:, None, :, None], torch.nan)
        name = kind or {torch.float16: "f16", torch.bfloat16: "bf16"}.get(dtype, "f32")
        args |= _cache(k, name, groups[0], 1, "k")
        args |= _cache(v, name, 1, groups[1], "v")
        if tail:
            # Of the tokens so far, the last ones are in the tail; a short sequence is all tail.
            coded = (args["lengths"] - tail).clamp_min(0)
            args["coded"] = coded // groups[0] * groups[0]
            for side, size in (("tail_k", head), ("tail_v", value_head or head)):
                more = normal(len(lengths), tail + groups[0], heads[1], size).transpose(1, 2)
                args[side] = more.to(dtype)
        q = normal(len(lengths), queries, heads[0], head).transpose(1, 2) * big
        args |= {"q": q.to(dtype), "scale": head**-0.5}
        if "sinks" in extra:
            args["sinks"] = normal(heads[0]).mul(3).to(dtype)
        if "slopes" in extra:
            args["slopes"] = normal(heads[0]).abs().mul(0.1)
        return args | options

    return make


_BF, _F32 = torch.bfloat16, torch.float32
_SMALL = Config({"BN": 16}, num_warps=4, num_stages=2)
_REAL = Config({"BN": 64}, num_warps=4, num_stages=2)
_HOPPER = ("sm_90",)
_NO_E4M3 = "sm_80 has no e4m3"

CASES = (
    Case("f16 ragged, empty, full", _problem((37, 0, 48)), _SMALL),
    Case("bf16 real tiles", _problem((101, 130), dtype=_BF, capacity=133, head=64), _REAL),
    Case("f32 split", _problem((45, 3), dtype=_F32, head=20), _SMALL),
    Case("one split", _problem((13, 16), capacity=16), _SMALL),
    Case("one split, sinks", _problem((13, 0), capacity=16, extra=("sinks",)), _SMALL),
    Case(
        "five new tokens, shorter than they",
        _problem((37, 3, 5), queries=5, heads=(6, 2), value_head=12),
        _SMALL,
    ),
    Case(
        "wgmma rows f16",
        _problem((190,), queries=16, heads=(4, 1), head=64, capacity=200),
        _REAL,
    ),
    Case(
        "wgmma rows bf16",
        _problem((70,), dtype=_BF, queries=9, heads=(8, 1), head=64, capacity=200),
        _REAL,
    ),
    Case("window", _problem((48, 29), queries=3, window=11, capacity=80), _SMALL),
    Case(
        "window and first tokens",
        _problem((120, 75, 4), queries=2, window=19, first=5, capacity=128),
        _SMALL,
    ),
    Case(
        "everything that scores may have",
        _problem((44, 0, 9), queries=2, extra=("sinks", "slopes"), softcap=5.0, window=30, first=2),
        _SMALL,
    ),
    Case(
        "f32 softcap, slopes", _problem((44,), dtype=_F32, extra=("slopes",), softcap=3.0), _SMALL
    ),
    Case("f16 scores of thousands", _problem((37, 48), big=30.0), _SMALL),
    Case("pages smaller than tiles", _problem((41, 0, 7), page=8, queries=2), _SMALL),
    Case("pages larger than tiles", _problem((100, 33), page=32, dtype=_BF, capacity=128), _SMALL),
    Case("int8 per token", _problem((41, 12), kind="int8", queries=2), _SMALL),
    Case("int8 per token, paged, bf16", _problem((41, 12), kind="int8", page=8, dtype=_BF), _SMALL),
    Case("4 bits in groups", _problem((41, 12), kind="u4", queries=2), _SMALL),
    Case("4 bits in groups within tiles", _problem((41, 12), kind="u4", groups=(8, 24)), _SMALL),
    Case(
        "4 bits in groups, paged, bf16",
        _problem((41, 60), kind="u4", page=16, dtype=_BF, capacity=64, window=20, first=4),
        _SMALL,
    ),
    Case("2 bits in groups", _problem((41, 12), kind="u2", head=48, dtype=_F32), _SMALL),
    Case("8 bits with zeros", _problem((41, 12), kind="u8"), _SMALL),
    Case(
        "4 bits and a tail",
        _problem((61, 3, 40), kind="u4", queries=2, groups=(8, 24), tail=13, capacity=64),
        _SMALL,
    ),
    Case(
        "tail, window, first tokens, slopes",
        _problem(
            (90, 21),
            dtype=_BF,
            queries=3,
            groups=(8, 24),
            tail=20,
            capacity=96,
            window=17,
            first=3,
            extra=("slopes", "sinks"),
        ),
        _SMALL,
    ),
    Case("e5m2", _problem((41, 12), kind="e5m2"), _SMALL),
    Case(
        "e4m3", _problem((41, 12), kind="e4m3", dtype=_BF), _SMALL, archs=_HOPPER, reason=_NO_E4M3
    ),
)


def _form(
    batch: int,
    heads: tuple[int, int],
    *,
    queries: int = 1,
    head: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cache: torch.dtype | None = None,
    page: int = 0,
    tokens: int = 8192,
    tail: int = 0,
    k_scale: tuple[int, int] | None = None,
    v_scale: tuple[int, int] | None = None,
    **options: Any,
):
    """k_scale, v_scale: tokens and channels that share a scale."""

    def make() -> Arguments:
        def meta(*sizes: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(sizes, dtype=of, device="meta")

        blocks, length = (batch * tokens // page, page) if page else (batch, tokens)
        width = head * options.get("k_bits", 8) // 8
        args: dict[str, Any] = {"q": meta(batch, heads[0], queries, head), "scale": head**-0.5}
        args["lengths"] = meta(batch, of=torch.int32)
        if page:
            args["table"] = meta(batch, tokens // page, of=torch.int32)
        if tail:
            args["coded"] = args["lengths"]
            args["tail_k"] = args["tail_v"] = meta(batch, heads[1], tail, head)
        for name, shared in (("k", k_scale), ("v", v_scale)):
            args[name] = meta(blocks, heads[1], length, width, of=cache or dtype)
            if shared:
                sizes = (blocks, heads[1], length // shared[0], head // shared[1])
                args[f"{name}_scale"] = meta(*sizes, of=torch.float32)
                if (cache or dtype) == torch.uint8:
                    args[f"{name}_zero"] = meta(*sizes, of=torch.float32)
        return args | options

    return make


_E4M3 = ("sm_89", "sm_9", "sm_1")
FORMS = (
    Form("bf16 8 x 32/8 x 128", _form(8, (32, 8)), "mma"),
    Form("f16 paged 16", _form(16, (32, 8), dtype=torch.float16, page=16), "mma"),
    Form("bf16 paged 256, 8 new tokens", _form(4, (64, 8), queries=8, page=256), "mma"),
    Form(
        "bf16 window, first tokens, softcap",
        _form(8, (16, 8), head=256, window=4096, first=4, softcap=50.0),
        "mma",
    ),
    Form("f32 1 x 8/8 x 64", _form(1, (8, 8), head=64, dtype=torch.float32)),
    Form(
        "int8 per token",
        _form(8, (32, 8), cache=torch.int8, k_scale=(1, 128), v_scale=(1, 128)),
        "mma",
    ),
    Form(
        "4 bits in groups",
        _form(8, (32, 8), cache=torch.uint8, k_scale=(64, 1), v_scale=(1, 64), k_bits=4, v_bits=4),
        "mma",
        ("sm_", "gfx9"),
    ),
    Form(
        "int8 and a tail",
        _form(8, (32, 8), cache=torch.int8, k_scale=(1, 128), v_scale=(1, 128), tail=256),
        "mma",
    ),
    Form("e4m3", _form(8, (32, 8), cache=torch.float8_e4m3fn), "mma", _E4M3),
)
