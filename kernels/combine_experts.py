"""The sum of what a token's experts made of it, by the weights of the routing.

Shazeer et al. 2017, eq. 1. Every result is one program's sum in the order of the slots: the same
bits every time, unlike sums by atomics.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .grouped_tiles import combine_kernel
from .launch import Config, Launch, Plan
from .operator import define
from .spec import Cost
from .triton_spec import Arguments, Case, Form, TritonSpec

CONFIGS = (
    Config({"BLOCK": 1024}, num_warps=4, archs=("sm_", "gfx1")),
    Config({"BLOCK": 256}, num_warps=1, archs=("sm_", "gfx1")),
    Config({"BLOCK": 1024}, num_warps=2, archs=("gfx9",)),
    Config({"BLOCK": 512}, num_warps=1, archs=("gfx9",)),
)
"""8 values for every lane, which loads them at once."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def combine_experts(y: Tensor, weights: Tensor, added: Tensor | None = None) -> Tensor:
    """added + sum over slots of weights[token, slot] * y[token * k + slot].

    y: [tokens * k, columns]; weights: [tokens, k]; added: [tokens, columns], a shared expert or the
    residual. Returns [tokens, columns] in y's dtype.
    """
    wide = torch.promote_types(y.dtype, torch.float32)
    slots = y.reshape(*weights.shape, y.shape[1]).to(wide)
    total = (slots * weights[:, :, None].to(wide)).sum(1)
    return (total if added is None else total + added.to(wide)).to(y.dtype)


def plan(
    y: Tensor,
    weights: Tensor,
    added: Tensor | None = None,
    *,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """weights are contiguous, the others have rows of any stride."""
    tokens, k = weights.shape
    columns = y.shape[1]
    known = [known for known in CONFIGS if known.serves(arch)]
    chosen = config or known[tokens * columns < 256 * 1024]
    out = torch.empty((tokens, columns), dtype=y.dtype, device=y.device)
    args = {
        "Y": y,
        "WEIGHTS": weights,
        "ADDED": added,
        "OUT": out,
        "columns": columns,
        "y_row": y.stride(0),
        "added_row": 0 if added is None else added.stride(0),
    }
    grid = (triton.cdiv(columns, chosen.constants["BLOCK"]), tokens)
    return Plan((out,), (Launch(combine_kernel, grid, args, {"K": k}).with_config(chosen),))


def why_not(arch: str, y: Tensor, weights: Tensor, added: Tensor | None = None) -> str | None:
    if y.dtype not in _FLOATS or (added is not None and added.dtype not in _FLOATS):
        return f"its rows are {y.dtype}"
    if not weights.is_contiguous():
        return "its weights are not contiguous"
    if y.stride(-1) != 1 or (added is not None and added.stride(-1) != 1):
        return "its columns do not lie side by side"
    if weights.shape[0] > 65535:
        return f"it has {weights.shape[0]} tokens"
    return None


def cost(y: Tensor, weights: Tensor, added: Tensor | None = None) -> Cost:
    """Everything once; a multiplication and an addition for each value."""
    tokens = weights.shape[0]
    moved = y.numel() + tokens * y.shape[1] * (1 if added is None else 2)
    return Cost(moved * y.element_size() + 4 * weights.numel(), 2 * y.numel())


def _problem(
    tokens: int,
    k: int,
    columns: int,
    dtype: torch.dtype,
    *,
    added: bool = False,
    big: float = 1.0,
):
    def make(generator: torch.Generator) -> Arguments:
        rows = torch.randn(tokens * k, columns + 5, generator=generator).mul(big).to(dtype)
        weights = torch.softmax(torch.randn(tokens, k, generator=generator), -1)
        more = torch.randn(tokens, columns, generator=generator).to(dtype)
        return {"y": rows[:, :columns], "weights": weights, "added": more if added else None}

    return make


def _large() -> Arguments:
    y = torch.empty(4096 * 8, 4096, dtype=torch.bfloat16, device="meta")
    return {"y": y, "weights": torch.empty(4096, 8, device="meta"), "added": y[:4096]}


SPEC = TritonSpec(
    name="combine_experts",
    schema="planish::combine_experts(Tensor y, Tensor weights, Tensor? added=None) -> Tensor",
    serves="sums over a token's experts",
    twin=combine_experts,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=(
        Case("f16", _problem(3, 2, 300, torch.float16)),
        Case("bf16 added", _problem(2, 5, 70, torch.bfloat16, added=True)),
        Case("f32 added", _problem(2, 3, 1030, torch.float32, added=True), CONFIGS[0]),
        Case("f16 of thousands", _problem(2, 1, 40, torch.float16, big=1e4)),
        Case("no tokens", _problem(0, 2, 40, torch.float16)),
    ),
    forms=(Form("bf16 4096 x 8 x 4096, added", _large),),
)

define(SPEC)
