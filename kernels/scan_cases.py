"""Test problems of the selective scan: small ones with numbers, realistic ones without."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import Config
from .triton_spec import Arguments, Case, Form


def _problem(
    batch: int,
    tokens: int,
    channels: int,
    states: int,
    *,
    dtype: torch.dtype = torch.float16,
    groups: int = 1,
    extra: Sequence[str] = (),
    softplus: bool = True,
    big: float = 1.0,
    by_channel: bool = False,
):
    """by_channel: u, delta, z lie as [batch, channels, tokens]."""

    def make(generator: torch.Generator) -> Arguments:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def row() -> Tensor:
            if by_channel:
                return normal(batch, channels, tokens).to(dtype).transpose(1, 2)
            return normal(batch, tokens, channels + 3).to(dtype)[..., :channels]

        both = normal(batch, tokens, groups, 2 * states).to(dtype)
        delta = row() * big
        args = {
            "u": row(),
            "delta": delta if softplus else delta.abs() * 0.1,
            "a": -normal(channels, states).exp(),
            "b": both[..., :states],
            "c": both[..., states:],
            "softplus": softplus,
        }
        made = {
            "d": lambda: normal(channels),
            "z": row,
            "delta_bias": lambda: normal(channels) * 0.1,
            "start": lambda: normal(batch, channels, states),
        }
        return args | {name: made[name]() for name in extra}

    return make


_BF, _F32 = torch.bfloat16, torch.float32
_ALL = ("d", "z", "delta_bias", "start")
_ONE = Config({"AHEAD": 1}, num_warps=4, num_stages=2)

CASES = (
    Case("f16", _problem(2, 7, 70, 16)),
    Case("bf16, everything", _problem(1, 6, 37, 16, dtype=_BF, extra=_ALL)),
    Case("f32, everything, groups", _problem(2, 5, 24, 16, dtype=_F32, extra=_ALL, groups=3)),
    Case("f16, groups of whole blocks", _problem(1, 3, 128, 16, groups=2, extra=("d",))),
    Case("f32, by channel", _problem(2, 9, 20, 16, dtype=_F32, extra=("z",), by_channel=True)),
    Case("one token", _problem(3, 1, 40, 16, extra=_ALL)),
    Case("one token at a time", _problem(1, 6, 40, 16, extra=("d",)), _ONE),
    Case("no tokens", _problem(2, 0, 12, 16, extra=("start",))),
    Case("12 states, no softplus", _problem(1, 5, 19, 12, dtype=_F32, softplus=False)),
    Case("128 states bf16", _problem(1, 4, 21, 128, dtype=_BF, groups=1, extra=("d",))),
    Case("steps of hundreds", _problem(1, 6, 30, 16, dtype=_F32, big=200.0, extra=("start",))),
)


def _form(batch: int, tokens: int, channels: int, states: int, dtype: torch.dtype):
    def make() -> Arguments:
        def meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        return {
            "u": meta(batch, tokens, channels),
            "delta": meta(batch, tokens, channels),
            "a": meta(channels, states, of=_F32),
            "b": meta(batch, tokens, 1, states),
            "c": meta(batch, tokens, 1, states),
            "d": meta(channels, of=_F32),
            "z": meta(batch, tokens, channels),
            "delta_bias": meta(channels, of=_F32),
            "softplus": True,
        }

    return make


FORMS = (
    Form("bf16 4 x 2048 x 5120, 16 states", _form(4, 2048, 5120, 16, _BF)),
    Form("f16 1 x 4096 x 2048, 128 states", _form(1, 4096, 2048, 128, torch.float16)),
    Form("bf16 32 x 1 x 4096, 16 states", _form(32, 1, 4096, 16, _BF)),
    Form("f32 2 x 512 x 1536, 64 states", _form(2, 512, 1536, 64, _F32)),
)
