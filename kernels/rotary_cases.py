"""Problems of the rotary kernel: small ones with numbers, realistic ones on the meta device."""

from __future__ import annotations

import torch

from .launch import Config
from .triton_spec import Arguments, Case, Form

_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16


def _turn(
    heads: tuple[int, int],
    length: int,
    channels: int,
    rotary: int,
    dtype: torch.dtype,
    *,
    interleaved: bool = False,
    transposed: bool = False,
    batched: bool = False,
    angles: torch.dtype | None = None,
):
    """Maker of arguments: two batches; transposed: heads cut out of a fused projection."""

    def make(generator: torch.Generator) -> Arguments:
        total = sum(heads)
        if transposed:
            fused = torch.randn(2, length, total, channels, generator=generator).to(dtype)
            q, k = fused.transpose(1, 2).split(heads, 1)
        else:
            q, k = (
                torch.randn(2, total, length, channels, generator=generator)
                .to(dtype)
                .split(heads, 1)
            )
        angle = torch.rand(2 if batched else 1, 1, length, rotary // 2, generator=generator) * 6.3
        angle = angle if batched else angle[0, 0]
        cos, sin = (t.to(angles or dtype) for t in (angle.cos(), angle.sin()))
        keys = k if heads[1] else None
        return {"q": q, "k": keys, "cos": cos, "sin": sin, "interleaved": interleaved}

    return make


def _plain(generator: torch.Generator) -> Arguments:
    """Two axes, and angles in halves of one table."""
    x = torch.randn(5, 48, generator=generator) * 100
    table = torch.randn(5, 48, generator=generator)
    return {"q": x, "k": None, "cos": table[:, :24], "sin": table[:, 24:], "interleaved": False}


_SMALL = Config({"TILE": 128}, num_warps=2)

CASES = (
    Case("f32", _turn((3, 1), 5, 16, 16, _F32)),
    Case("bf16 transposed", _turn((3, 2), 9, 32, 32, _BF16, transposed=True)),
    Case("f16 transposed, partial", _turn((2, 2), 7, 40, 12, _F16, transposed=True), _SMALL),
    Case("f16 interleaved", _turn((2, 1), 7, 24, 24, _F16, interleaved=True), _SMALL),
    Case(
        "bf16 interleaved, partial, angles by batch",
        _turn((3, 1), 3, 40, 20, _BF16, interleaved=True, transposed=True, batched=True),
    ),
    Case("bf16 with f32 angles", _turn((2, 1), 6, 16, 16, _BF16, angles=_F32)),
    Case("no keys", _turn((3, 0), 5, 16, 16, _F32)),
    Case("two axes", _plain),
    Case("no tokens", _turn((3, 1), 0, 16, 16, _F16)),
)


def _meta(
    batch: int, length: int, heads: tuple[int, int], channels: int, interleaved: bool = False
) -> Arguments:
    q, k = (
        torch.empty(batch, length, n, channels, dtype=_BF16, device="meta").transpose(1, 2)
        for n in heads
    )
    cos, sin = (torch.empty(length, channels // 2, dtype=_BF16, device="meta") for _ in range(2))
    return {"q": q, "k": k, "cos": cos, "sin": sin, "interleaved": interleaved}


FORMS = (
    Form("prompt of 4096, heads 32 and 8 of 128", lambda: _meta(1, 4096, (32, 8), 128)),
    Form("one token of 64 sequences", lambda: _meta(64, 1, (32, 8), 128)),
    Form("interleaved, heads 16 of 64", lambda: _meta(2, 2048, (16, 16), 64, True)),
)
