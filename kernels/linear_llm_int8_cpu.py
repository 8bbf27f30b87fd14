"""Int8 linear layers of which some columns are multiplied in floats (Dettmers et al. 2022).

The columns in which activations hold outliers are known when the layer runs: there x is multiplied
as it is with the weight's values. All others go through linear_w8a8_cpu.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from . import native
from .linear_affine import PackedAffine, decoded
from .linear_w8a8_cpu import SOURCE, why_not
from .linear_w8a8_cpu import _launch as _integer_product
from .linear_w8a8_cpu import cost as integer_cost
from .spec import Cost, KernelSpec


def linear_llm_int8_cpu_twin(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    outliers: Tensor,
    rows: int,
    length: int,
    width: int,
    group: int,
) -> Tensor:
    """In plain torch: float32 [..., rows].

    codes: int8 [..., length], zeros in outlier columns; x: the values [..., length] behind them;
    outliers: bool [length]; the others as in `linear_w8a8_cpu_twin`.
    """
    steps = codes.reshape(-1, length).double()
    steps = steps if zero is None else steps - zero.reshape(-1, 1)
    values = steps * scale.reshape(-1, 1).double()
    values = torch.where(outliers, x.reshape(-1, length).double(), values)
    matrix = decoded(weight, weight_scale, weight_zero, rows, length, width, group).double()
    found = values @ matrix.t()
    found = found if bias is None else found + bias.double()
    return found.float().reshape(*codes.shape[:-1], rows)


def _launch(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    outliers: Tensor,
    rows: int,
    length: int,
    width: int,
    group: int,
) -> Tensor:
    parts = (weight, weight_scale, weight_zero)
    sizes = (rows, length, width, group)
    out = _integer_product(codes, scale, zero, *parts, sums, bias, *sizes)
    columns = outliers.nonzero().flatten()
    if columns.numel():
        wide = _columns(columns, parts, sizes)
        out.view(-1, rows).addmm_(x.reshape(-1, length)[:, columns].float(), wide)
    return out


def _columns(
    columns: Tensor, parts: tuple[Tensor, Tensor, Tensor | None], sizes: tuple[int, int, int, int]
) -> Tensor:
    """Columns of a packed weight as values: float32 [columns, rows]."""
    codes, scale, zero = parts
    rows, length, width, group = sizes
    out = torch.empty(columns.numel(), rows)
    _decode()(
        columns.data_ptr(),
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero is None else zero.data_ptr(),
        out.data_ptr(),
        columns.numel(),
        rows,
        length,
        group,
        codes.stride(0),
        width,
    )
    return out


@cache
def _decode() -> ctypes._NamedFuncPointer:
    built = native.library(SOURCE)
    assert isinstance(built, ctypes.CDLL), built
    function = built.planish_affine_columns
    function.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 6
    function.restype = None
    return function


def cost(tokens: int, packed: PackedAffine, columns: int) -> Cost:
    """The integer product, and that of `columns` columns in floats."""
    whole = integer_cost(tokens, packed)
    moved = 4 * columns * (tokens + packed.rows)
    return Cost(whole.nbytes + moved, whole.flops + 2 * tokens * columns * packed.rows)


_LIBRARY = torch.library.Library("planish", "FRAGMENT")
_LIBRARY.define(
    "linear_llm_int8_cpu(Tensor codes, Tensor scale, Tensor? zero, Tensor weight, "
    "Tensor weight_scale, Tensor? weight_zero, Tensor? sums, Tensor? bias, Tensor x, "
    "Tensor outliers, int rows, int length, int width, int group) -> Tensor"
)
_LIBRARY.impl("linear_llm_int8_cpu", _launch, "CPU")


def _fake(codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, weight_scale: Tensor,
          weight_zero: Tensor | None, sums: Tensor | None, bias: Tensor | None, x: Tensor,
          outliers: Tensor, rows: int, length: int, width: int, group: int) -> Tensor:  # fmt: skip
    return codes.new_empty((*codes.shape[:-1], rows), dtype=torch.float32)


torch.library.register_fake("planish::linear_llm_int8_cpu", _fake, lib=_LIBRARY)

SPEC = KernelSpec(
    name="linear_llm_int8_cpu",
    device="cpu",
    serves="int8 linear layers of which columns with outliers are multiplied in floats",
    why_not=why_not,
    cost=cost,
    twin=linear_llm_int8_cpu_twin,
)
