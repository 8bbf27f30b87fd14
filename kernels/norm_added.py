"""A residual added and the sum normalized, in one pass: the seam between two transformer blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Config, Plan
from .norm import LOOPED, meta_rows, norm_result, norm_twin, sample
from .norm import cost as norm_cost
from .norm import why_not as norm_alone
from .norm_rows import CONFIGS, as_rows, even_rows, norm_launch
from .operator import define
from .spec import Cost
from .triton_spec import Arguments, Case, Form, TritonSpec


def added_twin(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual); the sum is rounded to x's dtype before the norm.

    x, residual: [..., channels] of one dtype; the norm as in `norm_twin`.
    """
    total = x + residual
    return norm_twin(total, weight, bias, eps, offset, center), total


def plan(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
    *,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """x, residual [..., channels] with rows at one stride each; the results are contiguous."""
    dtype = norm_result(x, weight, offset, center)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors = {
        "X": as_rows(x),
        "RESIDUAL": as_rows(residual),
        "WEIGHT": weight,
        "BIAS": bias,
        "OUT": out,
        "SUM": total,
    }
    return Plan((out, total), (norm_launch(tensors, eps, offset, center, config, arch),))


def residual_why_not(x: Tensor, residual: Tensor) -> str | None:
    if residual.dtype != x.dtype:
        return f"its residual is {residual.dtype} beside values of {x.dtype}"
    if residual.shape != x.shape:
        return "its residual has another shape"
    if not even_rows(residual):
        return "the rows of its residual are not evenly spaced"
    return None


def why_not(
    arch: str,
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
) -> str | None:
    alone = norm_alone(arch, x, weight, bias, eps, offset, center)
    return alone or residual_why_not(x, residual)


def cost(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
) -> Cost:
    """The norm, and the residual read and the sum written; one operation more a value."""
    alone = norm_cost(x, weight, bias, eps, offset, center)
    return Cost(alone.nbytes + 2 * x.numel() * x.element_size(), alone.flops + x.numel())


def _sample(rows: tuple[int, ...], columns: int, dtype: torch.dtype, center: bool):
    alone = sample(rows, columns, dtype, center)

    def make(generator: torch.Generator) -> Arguments:
        made = dict(alone(generator))
        wide = torch.randn(*rows, columns + 3, generator=generator).to(dtype)
        return {"x": made.pop("x"), "residual": wide[..., :columns], **made}

    return make


def _meta(rows: int, columns: int, dtype: torch.dtype, center: bool) -> Arguments:
    made = dict(meta_rows(rows, columns, dtype, center))
    return {**made, "residual": torch.empty_like(made["x"])}


SPEC = TritonSpec(
    name="norm_added",
    schema="planish::norm_added_triton(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, "
    "float eps, float offset=0.0, bool center=False) -> (Tensor, Tensor)",
    serves="normalization of a sum with a residual",
    twin=added_twin,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=(
        Case("rms f32", _sample((3, 2), 300, torch.float32, False)),
        Case("layer f16", _sample((5,), 70, torch.float16, True)),
        Case("rms bf16", _sample((3,), 300, torch.bfloat16, False)),
        Case("rms f16 in passes", _sample((3,), 513, torch.float16, False), config=LOOPED),
        Case("layer bf16 in passes", _sample((2,), 700, torch.bfloat16, True), config=LOOPED),
        Case("no rows", _sample((2, 0), 64, torch.float16, False)),
    ),
    forms=(
        Form("rms bf16 4096 x 4096", lambda: _meta(4096, 4096, torch.bfloat16, False)),
        Form("layer f16 4096 x 768", lambda: _meta(4096, 768, torch.float16, True)),
        Form("rms bf16 512 x 20000", lambda: _meta(512, 20000, torch.bfloat16, False)),
    ),
)

define(SPEC)
