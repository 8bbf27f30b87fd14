"""Linear layers on fp8 e4m3 weights with fp8 activations: float32 sums on the fp8 tensor cores.

A scale for each token and each channel (row-wise scaling, Micikevicius et al. 2022). Activations
come as codes, or are quantized by a launch of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .epilogue import standard
from .launch import Config, Launch, Plan
from .linear_bytes import by_token, choose, matmul_launches, scale_arguments
from .linear_dense_cases import meta, operands
from .linear_problem import (
    EPILOGUE_SCHEMA,
    FLOATS,
    finished,
    linear_cost,
    linear_problem,
    nbytes,
    why_not_linear,
)
from .operator import define
from .quantized_rows import fp8_why_not, quantized_twin
from .rows_to_codes import codes_launch
from .spec import Cost
from .triton_spec import Arguments, Case, Form, TritonSpec

FP8 = torch.float8_e4m3fn

CONFIGS = (
    Config({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, 8, 3, ("sm_9", "sm_10")),
    Config({"BM": 128, "BN": 128, "BK": 64, "GROUP": 8}, 8, 4, ("sm_89", "sm_12")),
    Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 4, ("sm_",)),
    Config({"BM": 16, "BN": 64, "BK": 128}, 4, 4, ("sm_",)),
)


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """activation(s_x s_w codes @ weight.T + bias) * gate + residual.

    weight: float8_e4m3fn [N, K]; weight_scale: one, or one a channel [N]. x: [..., K], floating:
    quantized by token, or by a static x_scale of one element, and saturated; or e4m3 codes, with an
    x_scale of one element or one a token and with the dtype of the result, which says that they
    are codes. Otherwise the result has x's dtype.
    """
    if dtype is not None:
        assert x_scale is not None, "codes come with their scale"
        codes, scale = x, x_scale
    else:
        codes, scale = quantized_twin(x, x_scale, "fp8")
    work = torch.promote_types(scale.dtype, torch.float32)
    sums = codes.to(work) @ weight.to(work).t()
    sums = sums * by_token(scale, x).to(work) * weight_scale.reshape(-1).to(work)
    kind = x.dtype if dtype is None or work == torch.float64 else dtype
    return finished(sums, bias, gate, residual, activation).to(kind)


def plan(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
    *,
    config: Config | None = None,
    arch: str = "sm_90",
    finish: Any = standard,
    operands: Sequence[Tensor | None] | None = None,
) -> Plan:
    """x [..., K], weight [N, K] with K side by side; the result is contiguous."""
    width = weight.shape[0]
    problem = linear_problem(x, width, (bias, gate, residual), activation, finish, operands)
    kind = dtype or x.dtype
    problem = replace(problem, out=torch.empty((*x.shape[:-1], width), dtype=kind, device=x.device))
    before: tuple[Launch, ...] = ()
    scale = x_scale
    if x.dtype != FP8:
        codes, scale, _, launch = codes_launch(problem.rows, x_scale, None, False, "fp8")
        problem, before = replace(problem, rows=codes), (launch,)
    assert scale is not None, "codes come with their scale"
    scales = scale_arguments(scale, None, weight_scale, None)
    chosen = config or choose(CONFIGS, problem.height, width, arch)
    matmul = matmul_launches(problem, weight, scales, chosen)
    return Plan((problem.out,), (*before, *matmul))


def why_not(
    arch: str,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
) -> str | None:
    if refused := fp8_why_not(arch):
        return refused
    if weight.dim() != 2 or weight.dtype != FP8:
        return f"its weight is {weight.dtype} {list(weight.shape)}"
    if weight.stride(1) != 1:
        return "the columns of its weight do not lie side by side"
    (width, length), tokens = weight.shape, x.numel() // max(x.shape[-1], 1)
    if weight_scale.numel() not in (1, width) or not weight_scale.is_contiguous():
        return f"its weight has {weight_scale.numel()} scales for {width} channels"
    if x.dtype == FP8 and x_scale is None:
        return "its codes come without a scale"
    if (x.dtype == FP8) != (dtype is not None):
        return "a dtype of the result goes with codes, and with nothing else"
    if x_scale is not None:
        if x_scale.numel() not in ((1, tokens) if x.dtype == FP8 else (1,)):
            return f"it has {x_scale.numel()} scales for {tokens} tokens"
        if not x_scale.is_contiguous():
            return "its scales do not lie side by side"
    if dtype not in (*FLOATS, None):
        return f"its result is {dtype}"
    kinds = (*FLOATS, FP8)
    return why_not_linear(x, width, length, (bias, gate, residual), activation, kinds)


def cost(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dtype: torch.dtype | None = None,
) -> Cost:
    """As a linear layer of fp8 weights; codes written and read once where x is not codes."""
    width = weight.shape[0]
    whole = linear_cost(x, width, nbytes(weight, weight_scale, x_scale), (bias, gate, residual))
    tokens = x.numel() // max(x.shape[-1], 1)
    wider = (dtype or x.dtype).itemsize - x.element_size()
    extra = tokens * width * wider + (0 if x.dtype == FP8 else 2 * x.numel())
    return Cost(whole.nbytes + extra, whole.flops)


def _make(
    lead: tuple[int, ...],
    width: int,
    length: int,
    dtype: torch.dtype,
    names: str = "",
    activation: str = "none",
    *,
    given: str = "",
    padding: int = 0,
    outlier: float = 1.0,
) -> Callable[[torch.Generator], Arguments]:
    """given: "static" scales, or "codes" with a scale a token. The second row is zero."""

    def make(generator: torch.Generator) -> Arguments:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        weight, steps = quantized_twin(random(width, length + padding), None, "fp8")
        x = random(*lead, length + padding)
        rows = x.flatten(0, -2)
        rows[1:2] = 0.0
        rows[2:3, :1] *= outlier
        made = {
            "x": x.to(dtype)[..., :length],
            "weight": weight[:, :length],
            "weight_scale": steps.flatten()[: 1 if given == "static" else width] * length**-0.5,
            "activation": activation,
            **operands(random, (*lead, width), names, dtype),
        }
        if given == "codes":
            coded, scales = quantized_twin(x, None, "fp8")
            made |= {"x": coded[..., :length], "x_scale": scales.flatten(), "dtype": dtype}
        if given == "static":
            made["x_scale"] = torch.full((1,), 0.005)
        return made

    return make


_HALF, _BRAIN, _FULL = torch.float16, torch.bfloat16, torch.float32
_TILED = Config({"BM": 64, "BN": 64, "BK": 64, "GROUP": 8}, 4, 3)
_SPLIT = Config({"BM": 16, "BN": 64, "BK": 64}, 4, 3)
_WIDE = Config({"BM": 128, "BN": 128, "BK": 128, "GROUP": 8}, 8, 3)
_ARCHS = ("sm_89", "sm_90")


def _case(name: str, make: Callable[[torch.Generator], Arguments], config: Config | None) -> Case:
    return Case(name, make, config, archs=_ARCHS)


def _form(height: int, width: int, length: int, dtype: torch.dtype):
    def make() -> Arguments:
        return {
            "x": meta(height, length, dtype=dtype),
            "weight": meta(width, length, dtype=FP8),
            "weight_scale": meta(width, dtype=_FULL),
            "bias": meta(width, dtype=dtype),
            "residual": meta(height, width, dtype=dtype),
            "activation": "silu",
        }

    return make


_FORM_ARCHS = ("sm_89", "sm_9", "sm_1")

SPEC = TritonSpec(
    name="linear_fp8",
    schema="planish::linear_fp8(Tensor x, Tensor weight, Tensor weight_scale, "
    "Tensor? x_scale=None, " + EPILOGUE_SCHEMA + ", ScalarType? dtype=None) -> Tensor",
    serves="linear layers on fp8 weights with fp8 activations",
    twin=linear_fp8,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=(
        _case(
            "tiled f16, ragged, bias and silu", _make((70,), 75, 100, _HALF, "b", "silu"), _TILED
        ),
        _case("tiled bf16, gate and residual", _make((2, 35), 66, 96, _BRAIN, "gr"), _TILED),
        _case("tiled f32, outliers", _make((20,), 40, 80, _FULL, "b", outlier=1e4), _TILED),
        _case(
            "tiled f16, static, saturated",
            _make((66,), 72, 72, _HALF, "br", "relu", given="static"),
            _TILED,
        ),
        _case("tiled codes", _make((66,), 72, 112, _FULL, given="codes", padding=16), _TILED),
        _case("tiled bf16, odd length", _make((17,), 33, 37, _BRAIN), _TILED),
        _case("tiled bf16, 8 warps", _make((130,), 136, 144, _BRAIN, "bgr", "gelu_tanh"), _WIDE),
        _case("split f16, one row", _make((1,), 70, 200, _HALF, "bgr", "quick_gelu"), _SPLIT),
        _case("split codes, 3 rows", _make((3,), 40, 136, _FULL, "r", given="codes"), _SPLIT),
        _case("no rows", _make((0, 3), 40, 64, _HALF), _TILED),
        _case("no rows, split", _make((0,), 40, 64, _HALF), None),
    ),
    forms=(
        Form("1 x 4096 x 11008 bf16", _form(1, 4096, 11008, _BRAIN), "fp8 mma", _FORM_ARCHS),
        Form("2048 x 11008 x 4096 f16", _form(2048, 11008, 4096, _HALF), "fp8 mma", _FORM_ARCHS),
        Form("100 x 4096 x 4099 f16", _form(100, 4096, 4099, _HALF), "fp8 mma", _FORM_ARCHS),
    ),
)

define(SPEC)
