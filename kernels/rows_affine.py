"""Look up rows of a packed affine integer table on the CPU: only the rows asked for are decoded."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import native
from .linear_affine import SOURCE, decoded, why_not
from .spec import Cost, KernelSpec


def rows_affine_twin(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rows: int,
    length: int,
    width: int,
    group: int,
) -> Tensor:
    """The kernel in plain torch: ids [...] to float32 [..., length]."""
    table = decoded(codes, scale, zero, rows, length, width, group)
    return torch.nn.functional.embedding(ids, table)


def _launch(
    ids: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    rows: int,
    length: int,
    width: int,
    group: int,
) -> Tensor:
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty((*ids.shape, length), dtype=torch.float32)
    outside = _function()(
        ids.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        out.data_ptr(),
        ids.numel(),
        rows,
        length,
        group,
        codes.stride(0),
        width,
        torch.get_num_threads(),
    )
    if outside:
        raise IndexError(f"an index is outside of a table of {rows} rows")
    return out


_found: list[ctypes._NamedFuncPointer] = []


def _function() -> ctypes._NamedFuncPointer:
    if not _found:
        built = native.library(SOURCE)
        assert isinstance(built, ctypes.CDLL), built
        function = built.planish_rows_affine
        function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 7
        _found.append(function)
    return _found[0]


def cost(ids: int, length: int, width: int, group: int, zeros: bool) -> Cost:
    """The codes and scales of the rows asked for, and the decoded rows."""
    groups = -(-length // group)
    return Cost(
        ids * (length * width // 8 + 4 * groups * (1 + zeros) + 4 * length), 2 * ids * length
    )


_LIBRARY = torch.library.Library("planish", "FRAGMENT")
_LIBRARY.define(
    "rows_affine(Tensor ids, Tensor codes, Tensor scale, Tensor? zero, "
    "int rows, int length, int width, int group) -> Tensor"
)
_LIBRARY.impl("rows_affine", _launch, "CPU")


def _fake(ids: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None,
          rows: int, length: int, width: int, group: int) -> Tensor:  # fmt: skip
    return scale.new_empty((*ids.shape, length))


torch.library.register_fake("planish::rows_affine", _fake, lib=_LIBRARY)

SPEC = KernelSpec(
    name="rows_affine",
    device="cpu",
    serves="look-ups in affine integer tables of 2 to 8 bits, any group size",
    why_not=why_not,
    cost=cost,
    twin=rows_affine_twin,
)
