"""What the problems of flash attention are made of; the problems: attention_cases.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .triton_spec import Arguments

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


def with_tensors(**makers: Callable[[torch.Generator], Tensor]):
    """Tensors made with the case's generator, as further arguments."""

    def extra(generator: torch.Generator) -> dict[str, Any]:
        return {name: maker(generator) for name, maker in makers.items()}

    return extra


def normal(*shape: int, dtype: torch.dtype = F32, size: float = 1.0):
    return lambda generator: (torch.randn(shape, generator=generator) * size).to(dtype)


def mostly(*shape: int, hidden: float = 0.3):
    """A boolean mask of which a share is hidden, and its first row whole."""

    def make(generator: torch.Generator) -> Tensor:
        mask = torch.rand(shape, generator=generator) > hidden
        if shape[-2] > 1:
            mask[..., 0, :] = False
        return mask

    return make


def hiding(value: float, *shape: int, dtype: torch.dtype = F32):
    """An additive mask: small numbers, and `value` on a third of it and on all of its first row."""

    def make(generator: torch.Generator) -> Tensor:
        mask = torch.randn(shape, generator=generator)
        hidden = torch.rand(shape, generator=generator) < 0.33
        hidden[..., 0, :] = True
        return mask.masked_fill(hidden, value).to(dtype)

    return make


def starts(*lengths: int):
    total = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return lambda generator: total


def stored(make: Callable[[torch.Generator], Arguments], kind: torch.dtype, axes: int):
    """Keys and values of a problem as codes; axes: how many the scales have, 0 for one number."""

    def stored(generator: torch.Generator) -> Arguments:
        args = dict(make(generator))
        largest = 127 if kind == torch.int8 else 448
        for name in ("k", "v"):
            values = args[name].float()
            kept = tuple(range(axes, 4)) if axes else None
            scale = values.abs().amax(kept) / largest
            worth = scale.reshape(*scale.shape, *(1,) * (4 - axes)) if axes else scale
            codes = values / worth
            args[name] = (codes.round() if kind == torch.int8 else codes).to(kind)
            args[f"{name}_scale"] = scale.reshape(*scale.shape, *(1,) * (3 - axes))
        return args

    return stored


def poisoned(make: Callable[[torch.Generator], Arguments], first: int, last: int):
    """NaN in keys and infinities in values that no query may read."""

    def poisoned(generator: torch.Generator) -> Arguments:
        args = make(generator)
        args["k"][:, :, first:last] = math.nan
        args["v"][:, :, first:last] = math.inf
        return args

    return poisoned


def block_map(*rows: str):
    """A block map, a string of 0 and 1 for each row of blocks."""
    flags = torch.tensor([[int(c) for c in row] for row in rows])[None, None]
    return lambda generator: flags.bool()


def loud(make: Callable[[torch.Generator], Arguments], size: float):
    """Scores of a large size: the queries are multiplied."""

    def loud(generator: torch.Generator) -> Arguments:
        args = dict(make(generator))
        return {**args, "q": args["q"] * size}

    return loud
