"""Root mean square and layer normalization over the last axis (Zhang & Sennrich 2019; Ba 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.ops import _rms_norm
from .launch import Config, Plan
from .norm_rows import CONFIGS, as_rows, norm_launch, norm_why_not
from .operator import define
from .spec import Cost
from .triton_spec import Arguments, Case, Form, TritonSpec


def norm_twin(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
) -> Tensor:
    """center=False: planish::rms_norm, without a bias; True: aten's layer_norm.

    x: [..., channels]; weight, bias: [channels] or absent; statistics in float32 for
    half-precision x. offset: added to the weight of a root mean square norm. Returns the shape of
    x; its dtype, or the wider one of x and the weight where rms_norm has it so.
    """
    if center:
        wide = torch.promote_types(x.dtype, torch.float32)
        scale, shift = (None if p is None else p.to(wide) for p in (weight, bias))
        shape = (x.shape[-1],)
        return torch.nn.functional.layer_norm(x.to(wide), shape, scale, shift, eps).to(x.dtype)
    assert bias is None, "a root mean square norm has no bias"
    return _rms_norm(x, weight, eps, offset)


def norm_result(x: Tensor, weight: Tensor | None, offset: float, center: bool) -> torch.dtype:
    """The dtype of the result: rms_norm multiplies by the weight in the wider dtype of the two."""
    if weight is None or center or offset != 0:
        return x.dtype
    return torch.promote_types(x.dtype, weight.dtype)


def plan(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
    *,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """x [..., channels] with rows at one stride; the result is contiguous."""
    dtype = norm_result(x, weight, offset, center)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    tensors = {"X": as_rows(x), "WEIGHT": weight, "BIAS": bias, "OUT": out}
    return Plan((out,), (norm_launch(tensors, eps, offset, center, config, arch),))


def why_not(
    arch: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
) -> str | None:
    if bias is not None and not center:
        return "a root mean square norm has no bias"
    return norm_why_not(x, weight, bias)


def cost(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
    center: bool = False,
) -> Cost:
    """Rows once in and once out, the parameters once; four operations a value, six if centered."""
    width = norm_result(x, weight, offset, center).itemsize
    parameters = sum(p.numel() * p.element_size() for p in (weight, bias) if p is not None)
    nbytes = x.numel() * (x.element_size() + width) + parameters
    return Cost(nbytes, (6 if center else 4) * x.numel())


def sample(
    rows: tuple[int, ...],
    columns: int,
    dtype: torch.dtype,
    center: bool,
    offset: float = 0.0,
    weight_dtype: torch.dtype | None = None,
):
    """Maker of arguments: rows cut out of a wider matrix, with outliers, a row of zeros."""

    def make(generator: torch.Generator) -> Arguments:
        wide = torch.randn(*rows, columns + 5, generator=generator)
        wide[..., :1] *= 300.0
        wide.flatten(0, -2)[1:2] = 0.0
        vector = torch.randn(2, columns, generator=generator).to(weight_dtype or dtype)
        return {
            "x": (wide + 2.0 * center).to(dtype)[..., 3 : 3 + columns],
            "weight": vector[0],
            "bias": vector[1] if center else None,
            "eps": 1e-5,
            "offset": offset,
            "center": center,
        }

    return make


def _bare(generator: torch.Generator) -> Arguments:
    x = torch.randn(5, 33, generator=generator) * 1e-3
    return {"x": x, "weight": None, "bias": None, "eps": 1e-12, "offset": 0.0, "center": False}


def _far(generator: torch.Generator) -> Arguments:
    """A mean of a thousand deviations: a one-pass variance would keep no digit of it."""
    x = torch.randn(2, 700, generator=generator) + 1000.0
    return {"x": x, "weight": None, "bias": None, "eps": 1e-5, "offset": 0.0, "center": True}


LOOPED = Config({"SPAN": 256, "TILE": 256}, num_warps=4)
"""For cases: rows of more than 256 channels go in passes."""

_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16


def meta_rows(rows: int, columns: int, dtype: torch.dtype, center: bool) -> Arguments:
    """Arguments of a realistic size on the meta device."""
    x = torch.empty(rows, columns, dtype=dtype, device="meta")
    weight = torch.empty(columns, dtype=dtype, device="meta")
    bias = torch.empty_like(weight) if center else None
    return {"x": x, "weight": weight, "bias": bias, "eps": 1e-5, "center": center}


SPEC = TritonSpec(
    name="norm",
    schema="planish::norm_triton(Tensor x, Tensor? weight, Tensor? bias, float eps, "
    "float offset=0.0, bool center=False) -> Tensor",
    serves="root mean square and layer normalization",
    twin=norm_twin,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=(
        Case("rms f32", sample((3, 2), 300, _F32, False)),
        Case("rms f16", sample((3,), 300, _F16, False)),
        Case("rms bf16 offset 1", sample((7,), 70, _BF16, False, 1.0)),
        Case("rms bf16, weight f32", sample((3,), 70, _BF16, False, 0.0, _F32)),
        Case("layer f32", sample((2, 3), 300, _F32, True)),
        Case("layer bf16, many short rows", sample((130,), 20, _BF16, True)),
        Case("layer f16 in passes", sample((3,), 700, _F16, True), config=LOOPED),
        Case("rms bf16 in passes", sample((3,), 513, _BF16, False), config=LOOPED),
        Case("rms f32 without weight", _bare),
        Case("layer f32 far from zero", _far),
        Case("layer f32 far from zero in passes", _far, config=LOOPED),
        Case("one channel", sample((4,), 1, _F32, False)),
        Case("no rows", sample((0,), 64, _F16, False)),
    ),
    forms=(
        Form("rms bf16 4096 x 4096", lambda: meta_rows(4096, 4096, _BF16, False)),
        Form("rms bf16 heads 131072 x 128", lambda: meta_rows(131072, 128, _BF16, False)),
        Form("layer f16 4096 x 1024", lambda: meta_rows(4096, 1024, _F16, True)),
        Form("layer f32 512 x 20000", lambda: meta_rows(512, 20000, _F32, True)),
        Form("rms bf16 512 x 16384", lambda: meta_rows(512, 16384, _BF16, False)),
    ),
)

define(SPEC)
