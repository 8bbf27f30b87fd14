"""Problems for flash attention: small ones with numbers, and realistic sizes to be compiled."""

from __future__ import annotations

import math

import torch

from .attention_problems import (
    BF16,
    F16,
    F32,
    block_map,
    hiding,
    large,
    loud,
    mostly,
    normal,
    poisoned,
    problem,
    starts,
    stored,
    with_tensors,
)
from .launch import Config
from .triton_spec import Case, Form

_LOWEST = torch.finfo(torch.float32).min
# tf32 cuts a factor to 11 bits; the error of a score, of about 3, is that of its weight.
_TF32 = 2.0**-9
# The cap's tanh is by exp2 in float32, with an error of the cap's last place.
_CAPPED = 2.0**-19


def _tile(rows: int, keys: int, warps: int = 4, stages: int = 2) -> Config:
    return Config({"BM": rows, "BN": keys}, num_warps=warps, num_stages=stages)


_PACKED = problem(
    70, 81, heads=4, kv_heads=2, causal=True, longest=40,
    extra=with_tensors(query_starts=starts(17, 0, 40, 13), key_starts=starts(25, 3, 40, 13)),
)  # fmt: skip
_SPARSE = problem(
    100, 96, batch=2, causal=True, block_queries=32, block_keys=32,
    extra=with_tensors(blocks=block_map("101", "100", "101", "001")),
)  # fmt: skip

# fmt: off
CASES = (
    # Rows and tiles that do not come out even; heads that share keys.
    Case("f16", problem()),
    Case("bf16 head 128", problem(67, 85, 128, dtype=BF16, causal=True)),
    Case("f32", problem(35, 43, 32, dtype=F32, causal=True)),
    Case("tf32", problem(35, 43, 32, dtype=F32, tf32=True), unit=_TF32),
    Case("f32 head 80", problem(19, 43, 80, dtype=F32, window=9)),
    Case("causal f16 head 80", problem(head=80, causal=True)),
    Case("f16 head 96", problem(head=96, heads=4, kv_heads=2)),
    Case("bf16 head 192 and 128", problem(head=192, value=128, dtype=BF16, causal=True)),
    Case("f16 head 256", problem(40, 40, 256, causal=True)),
    Case("f16 head 20 and 72", problem(head=20, value=72)),
    Case("f16 head 8", problem(head=8, value=12)),
    Case("one query", problem(1, 75, heads=8, kv_heads=2, batch=2, causal=True)),
    Case("five queries bf16", problem(5, 75, heads=6, kv_heads=2, dtype=BF16, causal=True)),
    # Full tiles, so that warpgroups multiply on sm_90.
    Case("full tiles f16", problem(130, 150, causal=True, heads=1), _tile(64, 64)),
    Case("full tiles bf16 128", problem(100, 130, 128, dtype=BF16), _tile(64, 64)),
    Case("wide tiles f16", problem(140, 460, causal=True, heads=1), _tile(128, 128, 8)),
    Case("wide tiles bf16 80", problem(130, 140, 80, dtype=BF16, heads=1), _tile(128, 64, 8)),
    Case("full tiles tf32", problem(70, 70, dtype=F32, tf32=True), _tile(64, 32), unit=_TF32),
    # What a query sees.
    Case("more queries than keys", problem(70, 33, causal=True)),
    Case("no keys", problem(20, 0)),
    Case("window in a tile", problem(90, 90, causal=True, window=5), _tile(32, 32)),
    Case("window over tiles", problem(60, 160, causal=True, window=50), _tile(32, 16)),
    Case("window to one side", problem(40, 70, window=20), _tile(16, 16)),
    Case("window past the keys", problem(40, 70, causal=True, window=99)),
    Case("window leaves out", poisoned(problem(32, 128, causal=True, window=32), 0, 64),
         _tile(32, 32)),
    # Masks, never expanded.
    Case("mask of keys", problem(
        9, 37, batch=2, extra=with_tensors(mask=mostly(2, 1, 1, 37))), _tile(16, 32, 1)),
    Case("mask of pairs", problem(
        21, 37, causal=True, extra=with_tensors(mask=mostly(21, 37))), _tile(16, 32, 1)),
    Case("mask of queries", problem(
        21, 37, extra=with_tensors(mask=mostly(1, 2, 21, 1))), _tile(16, 16, 1)),
    Case("bias of heads bf16", problem(
        21, 48, dtype=BF16, batch=2, extra=with_tensors(mask=normal(1, 2, 21, 48, dtype=BF16))),
        _tile(32, 32, 2)),
    Case("mask of -inf", problem(
        21, 37, extra=with_tensors(mask=hiding(-math.inf, 1, 1, 21, 37))), _tile(16, 16, 1)),
    Case("mask of the lowest", problem(
        21, 37, causal=True, dtype=F32, extra=with_tensors(mask=hiding(_LOWEST, 21, 37))),
        _tile(16, 16, 1)),
    Case("bias by columns", problem(
        21, 37, extra=with_tensors(mask=lambda g: normal(37, 21, dtype=F16)(g).t())),
        _tile(16, 32, 1)),
    # Blind queries that take the mean.
    Case("uniform, mask", problem(
        21, 37, causal=True, uniform_if_blind=True,
        extra=with_tensors(mask=mostly(21, 37))), _tile(16, 16, 1)),
    Case("uniform, -inf", problem(
        21, 37, uniform_if_blind=True, dtype=BF16,
        extra=with_tensors(mask=hiding(-math.inf, 21, 37, dtype=BF16))), _tile(16, 16, 1)),
    Case("uniform, more queries", problem(70, 33, causal=True, window=9, uniform_if_blind=True)),
    Case("uniform, sinks", problem(
        70, 33, causal=True, uniform_if_blind=True, extra=with_tensors(sinks=normal(2)))),
    # What is added to scores.
    Case("sinks", problem(50, 33, causal=True, extra=with_tensors(sinks=normal(2, size=3.0)))),
    Case("sinks and bias bf16", problem(dtype=BF16, extra=with_tensors(
        sinks=normal(2, dtype=BF16), mask=normal(37, 1, dtype=BF16)))),
    Case("cap", problem(softcap=5.0, causal=True), unit=_CAPPED),
    Case("slopes", problem(
        causal=True, extra=with_tensors(slopes=lambda g: torch.tensor([.5, .1])))),
    Case("slopes to both sides", problem(
        5, 53, heads=4, kv_heads=2, dtype=BF16,
        extra=with_tensors(slopes=lambda g: torch.tensor([.5, .25, .125, .01])))),
    Case("everything", problem(
        20, 53, causal=True, window=30, softcap=20.0, heads=4, kv_heads=2,
        extra=with_tensors(mask=mostly(1, 20, 53), sinks=normal(4), slopes=normal(4))),
        _tile(32, 32, 2), unit=_CAPPED),
    # Scores to ten thousand.
    Case("loud f32", loud(problem(dtype=F32, causal=True), 2500.0)),
    Case("loud bf16", loud(problem(dtype=BF16), 2500.0)),
    # Packed sequences, one of them without queries.
    Case("packed", _PACKED, _tile(32, 32)),
    Case("packed, longest not known", lambda g: {**_PACKED(g), "longest": 0}, _tile(16, 32)),
    Case("packed, sinks and window", lambda g: {
        **_PACKED(g), "window": 11, "sinks": torch.tensor([.5, 1., 0., -1.])}),
    # Block maps; what they leave out may hold anything.
    Case("blocks", _SPARSE, _tile(32, 16)),
    Case("blocks leave out", poisoned(_SPARSE, 32, 64), _tile(32, 32)),
    Case("blocks of heads", problem(
        64, 90, heads=4, kv_heads=2, window=40, block_queries=16, block_keys=32,
        extra=with_tensors(blocks=lambda g: torch.rand(1, 4, 4, 3, generator=g) > 0.5))),
    Case("blocks, packed", lambda g: {
        **_PACKED(g), "block_queries": 16, "block_keys": 16,
        "blocks": (torch.rand(4, 1, 3, 3, generator=g) > 0.4).int()}),
    # Keys and values as codes.
    Case("int8 of tokens", stored(problem(causal=True, heads=4, kv_heads=2), torch.int8, 3)),
    Case("int8 of heads bf16", stored(problem(dtype=BF16, heads=4, kv_heads=2), torch.int8, 2)),
    Case("int8 of one", stored(problem(70, 70, softcap=5.0), torch.int8, 0), unit=_CAPPED),
    Case("float8 of tokens", stored(problem(causal=True), torch.float8_e4m3fn, 3),
         archs=("sm_90",)),
    Case("float8 of one bf16", stored(problem(70, 70, dtype=BF16), torch.float8_e4m3fn, 0),
         _tile(64, 64), archs=("sm_90",)),
)
# fmt: on

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
