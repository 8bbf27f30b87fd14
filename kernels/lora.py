"""Low-rank updates of many adapters in one call: each row of a batch has an adapter of its own.

Hu et al. 2021, "LoRA", eq. 3; batched as in Chen et al. 2023, "Punica" and Sheng et al. 2023,
"S-LoRA". For a few rows each row is a program; many rows are given sorted by adapter, and a tile
of them goes through its adapters one after another.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .decode_shapes import PROCESSORS, alignment
from .launch import Config, Launch, Plan
from .lora_cases import CASES, FORMS
from .lora_tiles import (
    lora_expand_kernel,
    lora_row_expand_kernel,
    lora_row_shrink_kernel,
    lora_shrink_kernel,
)
from .operand_views import as_rows
from .operator import define
from .spec import Cost
from .triton_spec import TritonSpec

# Of sm_100 the accumulators of 128 columns and rank 128 do not fit its registers.
_NOT_TCGEN = ("sm_8", "sm_9", "sm_12")
CONFIGS = (
    Config({"BM": 64, "BN": 128, "BK": 64}, num_warps=8, num_stages=2, archs=_NOT_TCGEN),
    Config({"BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=2, archs=("sm_", "gfx9")),
    Config({"BM": 32, "BN": 64, "BK": 32}, num_warps=4, num_stages=2),
)
_ROW_RANKS, _ROW_COLUMNS = 8, 512
_ROW_TILE = 8192
_MOST_PARTS = 16
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def lora(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    adapters: Tensor,
    order: Tensor | None = None,
) -> Tensor:
    """y[i] + scale[n] * b[n] @ (a[n] @ x[i]) where n = adapters[i]; y[i] where that is negative.

    y: [..., out]; x: [..., in], of as many rows; a: [adapters, rank, in]; b: [adapters, out, rank]
    (an adapter of a lower rank is padded by zeros); scale: [adapters]; adapters: int32 [rows].
    order: int32 [rows], the rows sorted by adapter; it says how to compute, never what. Returns
    y's shape and dtype.
    """
    del order
    wide = torch.promote_types(x.dtype, torch.float32)
    chosen = adapters.to(torch.int64)
    has = (chosen >= 0)[:, None]
    chosen = chosen.clamp_min(0)
    rows = x.reshape(-1, x.shape[-1]).to(wide)
    low = torch.einsum("mri,mi->mr", a[chosen].to(wide), rows)
    update = torch.einsum("mor,mr->mo", b[chosen].to(wide), low) * scale[chosen, None].to(wide)
    update = torch.where(has, update, 0).reshape(y.shape)
    return (y.to(wide) + update).to(y.dtype)


def plan(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    adapters: Tensor,
    order: Tensor | None = None,
    *,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """With `order` by tiles of rows, without by rows; x and y with rows of any stride."""
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    y, x = as_rows(y, y.shape[-1]), as_rows(x, x.shape[-1])
    rows, columns = x.shape
    rank = a.shape[1]
    chosen = config or default_config(rows, arch)
    tile = dict(chosen.constants)
    blocks = rows * triton.cdiv(rank, _ROW_RANKS)
    step = _ROW_COLUMNS
    if order is not None:
        blocks, step = triton.cdiv(rows, tile["BM"]), tile["BK"]
    parts = part_count(blocks, triton.cdiv(columns, step), arch)
    share = triton.cdiv(triton.cdiv(columns, step), parts) * step
    low = torch.empty((parts, rows, rank), dtype=torch.float32, device=y.device)
    shrink = {
        "X": x,
        "A": a,
        "ADAPTERS": adapters,
        "PARTS": low,
        "rows": rows,
        "columns": columns,
        "share": share,
        "x_row": x.stride(0),
        "a_adapter": a.stride(0),
        "a_rank": a.stride(1),
    }
    expand = {
        "PARTS": low,
        "B": b,
        "SCALE": scale,
        "ADAPTERS": adapters,
        "Y": y,
        "OUT": out.view(y.shape),
        "rows": rows,
        "columns": y.shape[1],
        "parts": parts,
        "y_row": y.stride(0),
        "b_adapter": b.stride(0),
        "b_column": b.stride(1),
    }
    of_a = {
        "RANK": rank,
        "DIVISOR": math.gcd(columns, 16),
        "X_ALIGN": alignment(x),
        "A_ALIGN": alignment(a),
    }
    of_b = {"RANK": rank, "B_ALIGN": alignment(b)}
    if order is None:
        launches = _by_row(shrink, expand, of_a, of_b)
    else:
        shrink["ORDER"] = expand["ORDER"] = order
        of_b |= {"DIVISOR": math.gcd(y.shape[1], 16)}
        of_b |= {"Y_ALIGN": alignment(y), "O_ALIGN": alignment(out)}
        launches = _by_tile(shrink, expand, of_a, of_b, chosen)
    return Plan((out,), launches)


def _by_row(
    shrink: dict[str, Any],
    expand: dict[str, Any],
    of_a: dict[str, int],
    of_b: dict[str, int],
) -> tuple[Launch, ...]:
    parts, rows, rank = _sizes(shrink)
    columns = _sizes(expand, "OUT")[1]
    first = Launch(
        lora_row_shrink_kernel,
        (parts, triton.cdiv(rank, _ROW_RANKS), rows),
        shrink,
        {**of_a, "BR": _ROW_RANKS, "BK": _ROW_COLUMNS},
    )
    ranks = triton.next_power_of_2(rank)
    block = max(16, _ROW_TILE // ranks)
    second = Launch(
        lora_row_expand_kernel,
        (triton.cdiv(columns, block), rows),
        expand,
        {**of_b, "BR": ranks, "BN": block},
    )
    return first, second


def _by_tile(
    shrink: dict[str, Any],
    expand: dict[str, Any],
    of_a: dict[str, int],
    of_b: dict[str, int],
    config: Config,
) -> tuple[Launch, ...]:
    parts, rows, rank = _sizes(shrink)
    columns = _sizes(expand, "OUT")[1]
    ranks = max(16, triton.next_power_of_2(rank))
    tile = config.constants
    blocks = triton.cdiv(rows, tile["BM"])
    options = (config.num_warps, config.num_stages)
    both = {"BR": ranks, "BM": tile["BM"]}
    first = Launch(
        lora_shrink_kernel, (parts, blocks), shrink, {**of_a, **both, "BK": tile["BK"]}, *options
    )
    grid = (triton.cdiv(columns, tile["BN"]), blocks)
    second = Launch(lora_expand_kernel, grid, expand, {**of_b, **both, "BN": tile["BN"]}, *options)
    return first, second


def _sizes(args: dict[str, Any], name: str = "PARTS") -> torch.Size:
    tensor = args[name]
    assert isinstance(tensor, Tensor)
    return tensor.shape


def default_config(rows: int, arch: str) -> Config:
    """The largest tiles where they still make enough programs, the smallest otherwise."""
    served = [config for config in CONFIGS if config.serves(arch)]
    return served[0] if rows >= 1024 else served[-1]


def part_count(blocks: int, steps: int, arch: str) -> int:
    """Parts of the input: as many as fill the machine, none with less than two steps."""
    wanted = triton.cdiv(2 * PROCESSORS.get(arch, 108), max(blocks, 1))
    return max(1, min(wanted, steps // 2, _MOST_PARTS))


def why_not(
    arch: str,
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    adapters: Tensor,
    order: Tensor | None = None,
) -> str | None:
    if x.dtype not in _FLOATS or y.dtype not in _FLOATS:
        return f"its rows are {x.dtype} and {y.dtype}"
    if a.dtype != x.dtype or b.dtype != x.dtype:
        return f"its adapters are {a.dtype} and its rows {x.dtype}"
    if adapters.dtype != torch.int32 or (order is not None and order.dtype != torch.int32):
        return "its indices are not int32"
    if a.shape[1] > 128:
        return f"its rank {a.shape[1]} is greater than 128"
    strided = (y, x, a, b, scale, adapters, *([] if order is None else [order]))
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in strided):
        return "its columns do not lie side by side"
    rows = x.numel() // x.shape[-1]
    if order is None and rows > 65535:
        return f"its {rows} rows are not sorted by adapter"
    return None


def cost(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    adapters: Tensor,
    order: Tensor | None = None,
) -> Cost:
    """Rows in and out, and each adapter once where there is a row for it; both products."""
    rank, rows = a.shape[1], x.numel() // x.shape[-1]
    used = min(rows, a.shape[0])
    moved = used * (a[:1].numel() + b[:1].numel()) * a.element_size()
    moved += x.numel() * x.element_size() + 2 * y.numel() * y.element_size()
    return Cost(moved, 2 * rows * rank * (x.shape[1] + y.shape[1]))


SPEC = TritonSpec(
    name="lora",
    schema="planish::lora(Tensor y, Tensor x, Tensor a, Tensor b, Tensor scale, Tensor adapters, "
    "Tensor? order=None) -> Tensor",
    serves="low-rank adapters, one for each row",
    twin=lora,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
