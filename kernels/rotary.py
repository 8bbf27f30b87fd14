"""Rotary position embedding of queries and keys in one launch (Su et al. 2021, eq. 34).

Heads are read where they lie, so a [batch, length, heads, channels] projection seen through a
transpose costs no copy. The arithmetic is in float32 and rounds once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..ir.ops import _rotary
from .launch import Config, Launch, Plan
from .operator import define
from .rotary_cases import CASES, FORMS
from .rotary_tiles import rotary_kernel
from .spec import Cost
from .triton_spec import TritonSpec

CONFIGS = (
    Config({"TILE": 512}, num_warps=1, archs=("sm_", "gfx1")),
    Config({"TILE": 2048}, num_warps=4, archs=("sm_", "gfx1")),
    Config({"TILE": 1024}, num_warps=1, archs=("gfx9",)),
    Config({"TILE": 2048}, num_warps=2, archs=("gfx9",)),
)
"""TILE: channels of one program, 16 for every lane: 8 of each half, loaded at once."""


def rotary_twin(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """planish::rotary of q and k (an empty k where there is none), in their dtype, `laid_out`.

    q: [..., length, channels], k with other heads; cos, sin: [..., length, rotary / 2], broadcast
    over the heads of both. cos and sin may be float32 beside narrower q: the result is q's dtype.
    """
    turned = laid_out(q).copy_(_rotary(q, cos, sin, interleaved))
    if k is None:
        return turned, q.new_empty(0)
    return turned, laid_out(k).copy_(_rotary(k, cos, sin, interleaved))


def laid_out(x: Tensor) -> Tensor:
    """An empty [..., heads, length, channels] like x, the heads of a token side by side.

    Attention keeps this order, so that its result is [batch, length, heads * channels] by a view.
    """
    batch, heads, length, channels = _four(x).shape
    made = x.new_empty(batch, length, heads, channels).transpose(1, 2)
    return made[(0,) * (4 - x.dim())]


def plan(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    *,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """q, k [..., length, channels] of at most four axes, any strides but 1 between channels."""
    q_out, k_out = laid_out(q), q.new_empty(0) if k is None else laid_out(k)
    batch, heads, length, channels = _four(q).shape
    k_heads = 0 if k is None else _four(k).shape[1]
    half = cos.shape[-1]
    block, passed = triton.next_power_of_2(max(half, 1)), channels - 2 * half
    many = batch * (heads + k_heads) * length * channels > 1 << 20
    chosen = config or [known for known in CONFIGS if known.serves(arch)][many]
    rows = max(1, chosen.constants["TILE"] // (2 * block))
    q_blocks, k_blocks = (triton.cdiv(n * length, rows) for n in (heads, k_heads))
    args: dict[str, Any] = {
        "Q": q,
        "K": k,
        "Q_OUT": q_out,
        "K_OUT": None if k is None else k_out,
        "COS": cos,
        "SIN": sin,
        "q_blocks": q_blocks,
        "q_heads": heads,
        "k_heads": k_heads,
        "length": length,
        "channels": channels,
        "half": half,
        **_strides("q", q),
        **_strides("k", k),
        **_strides("cos", cos),
        **_strides("sin", sin),
    }
    constants = {
        "INTERLEAVED": interleaved,
        "ROWS": rows,
        "BLOCK": block,
        "PASSED": triton.next_power_of_2(passed) if passed > 0 else 0,
    }
    grid = (q_blocks + k_blocks, batch)
    launch = Launch(rotary_kernel, grid, args, constants, num_warps=chosen.num_warps)
    return Plan((q_out, k_out), (launch,))


def _four(x: Tensor) -> Tensor:
    """x with axes of size one before its others, four in all; no copy."""
    return x[(None,) * (4 - x.dim())]


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Elements between batches, heads and tokens; zero where an axis is broadcast."""
    axes = ("batch", "head", "token")
    if x is None:
        return {f"{name}_{axis}": 0 for axis in axes}
    wide = _four(x)
    steps = (0 if n == 1 else s for n, s in zip(wide.shape, wide.stride(), strict=True))
    return {f"{name}_{axis}": step for axis, step in zip(axes, steps, strict=False)}


def why_not(
    arch: str, q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its values are {q.dtype}"
    if any(t.dtype not in (q.dtype, torch.float32) for t in (cos, sin)):
        return f"its angles are {cos.dtype} beside values of {q.dtype}"
    if q.dim() > 4 or q.dim() < 2:
        return f"it has {q.dim()} axes; the kernel takes two to four"
    if k is not None and (k.dtype != q.dtype or k.dim() != q.dim()):
        return "its keys have another dtype or other axes than its queries"
    if k is not None and (_four(k).shape[0], *k.shape[-2:]) != (_four(q).shape[0], *q.shape[-2:]):
        return "its keys differ from its queries in more than the number of heads"
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in (q, k, cos, sin) if t is not None):
        return "its channels do not lie side by side"
    if cos.shape != sin.shape or 2 * cos.shape[-1] > q.shape[-1]:
        return "its angles do not fit its channels"
    heads = {_four(t).shape[1] for t in (q, k) if t is not None}
    if cos.dim() > 4 or (_four(cos).shape[1] != 1 and heads != {_four(cos).shape[1]}):
        return "its angles differ from head to head"
    return None


def cost(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Cost:
    """Heads once in and once out, angles once; three operations a rotated channel."""
    values = q.numel() + (0 if k is None else k.numel())
    angles = 2 * cos.numel() * cos.element_size()
    turned = values * 2 * cos.shape[-1] // max(q.shape[-1], 1)
    return Cost(2 * values * q.element_size() + angles, 3 * turned)


SPEC = TritonSpec(
    name="rotary",
    schema="planish::rotary_triton(Tensor q, Tensor? k, Tensor cos, Tensor sin, "
    "bool interleaved=False) -> (Tensor, Tensor)",
    serves="rotary position embedding",
    twin=rotary_twin,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
