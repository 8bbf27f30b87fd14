"""How two values of a running program are compared: bits by digest, numbers by relative norm."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 21


def digest(value: Any) -> bytes:
    """Equal for values of the same dtype, shape and bits; -0 is 0 and any NaN is NaN."""
    if not isinstance(value, Tensor):
        return repr(value).encode()
    found = hashlib.blake2b(f"{value.dtype}{list(value.shape)}".encode(), digest_size=16)
    for block in value.detach().contiguous().view(-1).split(_CHUNK):
        if block.is_floating_point():
            block = torch.where(block.isnan(), torch.nan, block + 0.0)
        elif block.is_complex():
            block = torch.view_as_real(block) + 0.0
        found.update(block.contiguous().view(torch.uint8).numpy().data)
    return found.digest()


def relative_deviation(reference: Any, value: Any) -> float:
    """||value - reference|| / ||reference|| over the finite places of the reference.

    NaNs and infinities (with their signs) must stand in the same places, integers and booleans be
    equal; inf where they do not. Computed in float64, in blocks.
    """
    if not isinstance(reference, Tensor) or not isinstance(value, Tensor):
        return 0.0 if _same(reference, value) else float("inf")
    if reference.shape != value.shape:
        if reference.squeeze().shape != value.squeeze().shape:
            return float("inf")
        value = value.reshape(reference.shape)
    if not reference.is_floating_point():
        return 0.0 if torch.equal(reference, value.to(reference.dtype)) else float("inf")
    gap = scale = 0.0
    pairs = zip(reference.reshape(-1).split(_CHUNK), value.reshape(-1).split(_CHUNK), strict=True)
    for a, b in pairs:
        a, b = a.double(), b.double()
        finite = a.isfinite()
        if not (finite.all() and b.isfinite().all()):
            if not torch.equal(_odd_places(a), _odd_places(b)):
                return float("inf")
            a, b = a[finite], b[finite]
        gap += float((a - b).square().sum())
        scale += float(a.square().sum())
    return (gap / scale) ** 0.5 if scale else gap**0.5


def _odd_places(values: Tensor) -> Tensor:
    """0 where finite, 1 where NaN, 2 and 3 where infinite."""
    return values.isnan() + 2 * values.isposinf() + 3 * values.isneginf()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and not any(
            relative_deviation(x, y) for x, y in zip(a, b, strict=True)
        )
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def count_nans(value: Any) -> int:
    if isinstance(value, Tensor) and value.is_floating_point():
        return int(value.isnan().sum())
    return 0


def epsilon(value: Any) -> float:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return torch.finfo(value.dtype).eps if floating else 0.0
