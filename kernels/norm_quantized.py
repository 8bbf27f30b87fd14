"""Normalization with its result quantized in the same pass, for the integer matmul that follows.

The result is rounded to the dtype that an unfused norm would give, then to codes: the fusion
changes no code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Config, Plan
from .norm import LOOPED, meta_rows, norm_twin, sample
from .norm import cost as norm_cost
from .norm import why_not as norm_alone
from .norm_added import residual_why_not
from .norm_rows import CONFIGS, as_rows, norm_launch
from .operator import define
from .quantized_rows import code_dtype, code_why_not, quantized_twin
from .spec import Cost
from .triton_spec import Arguments, Case, Form, TritonSpec


def norm_quantized_twin(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
    codes: str = "int8",
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales, sum) of norm(x + residual), the norm as in `norm_twin`.

    x, residual: [..., channels]. codes: "int8" (-127 to 127) or "fp8" (e4m3). scale: float32 of
    one element, the static step of all; without it each row has its own, its largest magnitude
    over 127 or 448. Returns codes [..., channels]; scales [..., 1] in float32, [0] where static;
    the sum [..., channels] in x's dtype, [0] without a residual.
    """
    total = x if residual is None else x + residual
    normed = norm_twin(total, weight, bias, eps, offset, center)
    coded, steps = quantized_twin(normed, scale, codes)
    nothing = steps.new_empty(0)
    return (
        coded,
        nothing if scale is not None else steps,
        x.new_empty(0) if residual is None else total,
    )


def plan(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
    codes: str = "int8",
    *,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """x, residual [..., channels] with rows at one stride each; the results are contiguous."""
    out = torch.empty(x.shape, dtype=code_dtype(codes), device=x.device)
    steps = (0,) if scale is not None else (*x.shape[:-1], 1)
    scales = torch.empty(steps, dtype=torch.float32, device=x.device)
    total = torch.empty((0,) if residual is None else x.shape, dtype=x.dtype, device=x.device)
    tensors = {
        "X": as_rows(x),
        "RESIDUAL": None if residual is None else as_rows(residual),
        "WEIGHT": weight,
        "BIAS": bias,
        "STATIC": scale,
        "OUT": out,
        "SUM": None if residual is None else total,
        "SCALE": None if scale is not None else scales,
    }
    launch = norm_launch(tensors, eps, offset, center, config, arch, codes)
    return Plan((out, scales, total), (launch,))


def why_not(
    arch: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
    codes: str = "int8",
) -> str | None:
    return (
        norm_alone(arch, x, weight, bias, eps, offset, center)
        or (None if residual is None else residual_why_not(x, residual))
        or code_why_not(arch, scale, codes)
    )


def cost(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
    codes: str = "int8",
) -> Cost:
    """The norm with one byte a value written and a scale a row; three more operations a value."""
    parameters = sum(p.numel() * p.element_size() for p in (weight, bias) if p is not None)
    moved = x.numel() * (x.element_size() + 1) + 4 * x.numel() // max(x.shape[-1], 1) + parameters
    moved += 0 if residual is None else 2 * x.numel() * x.element_size()
    flops = norm_cost(x, weight, bias, eps, offset, center).flops + 3 * x.numel()
    return Cost(moved, flops)


def _sample(
    rows: tuple[int, ...],
    columns: int,
    dtype: torch.dtype,
    center: bool,
    *,
    codes: str = "int8",
    static: float | None = None,
    residual: bool = False,
    offset: float = 0.0,
):
    alone = sample(rows, columns, dtype, center, offset)

    def make(generator: torch.Generator) -> Arguments:
        made = dict(alone(generator))
        other = torch.randn(*rows, columns, generator=generator).to(dtype)
        return {
            **made,
            "residual": other if residual else None,
            "scale": None if static is None else torch.tensor([static]),
            "codes": codes,
        }

    return make


def _ties(generator: torch.Generator) -> Arguments:
    """Rows of +-1 have a root mean square of 1, so the weights alone make exact ties."""
    signs = torch.randint(0, 2, (3, 128), generator=generator) * 2.0 - 1.0
    weight = torch.arange(128) - 64 + 0.5
    none = {"residual": None, "bias": None, "offset": 0.0, "center": False, "codes": "int8"}
    return {"x": signs, "weight": weight, "scale": torch.ones(1), "eps": 0.0, **none}


def _meta(
    rows: int, columns: int, dtype: torch.dtype, center: bool, codes: str, static: bool = False
) -> Arguments:
    made = meta_rows(rows, columns, dtype, center)
    scale = torch.empty(1, device="meta") if static else None
    return {**made, "residual": torch.empty_like(made["x"]), "scale": scale, "codes": codes}


_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
_FP8 = ("sm_89", "sm_9", "sm_1")

SPEC = TritonSpec(
    name="norm_quantized",
    schema="planish::norm_quantized_triton(Tensor x, Tensor? residual, Tensor? weight, "
    "Tensor? bias, Tensor? scale, float eps, float offset=0.0, bool center=False, "
    'str codes="int8") -> (Tensor, Tensor, Tensor)',
    serves="normalization with its result quantized",
    twin=norm_quantized_twin,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=(
        Case("rms f32", _sample((3, 2), 300, _F32, False)),
        Case("layer f16 with residual", _sample((5,), 70, _F16, True, residual=True)),
        Case("rms bf16 static, saturated", _sample((3,), 300, _BF16, False, static=0.02)),
        Case("exact ties", _ties),
        Case("rms f16 in passes", _sample((3,), 513, _F16, False, residual=True), config=LOOPED),
        Case("layer bf16 static in passes", _sample((2,), 700, _BF16, True, static=0.1), LOOPED),
        Case("rms f16 fp8", _sample((3,), 300, _F16, False, codes="fp8"), archs=("sm_90",)),
        Case(
            "layer f32 fp8 static, saturated",
            _sample((3,), 70, _F32, True, codes="fp8", static=0.01),
            archs=("sm_90",),
        ),
        Case(
            "rms bf16 fp8 in passes",
            _sample((2,), 513, _BF16, False, codes="fp8", offset=1.0),
            LOOPED,
            archs=("sm_90",),
        ),
        Case("no rows", _sample((0,), 64, _F16, False)),
    ),
    forms=(
        Form("rms bf16 int8 4096 x 4096", lambda: _meta(4096, 4096, _BF16, False, "int8")),
        Form("layer f16 int8 4096 x 768", lambda: _meta(4096, 768, _F16, True, "int8", True)),
        Form("rms bf16 int8 512 x 20000", lambda: _meta(512, 20000, _BF16, False, "int8")),
        Form(
            "rms bf16 fp8 4096 x 4096", lambda: _meta(4096, 4096, _BF16, False, "fp8"), archs=_FP8
        ),
    ),
)

define(SPEC)
