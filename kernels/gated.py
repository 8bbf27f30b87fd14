"""The gate of a gated MLP in one pass over memory: activation(gate) * up (Shazeer 2020, eq. 6).

gate and up may be halves of one fused projection: rows are read by their stride.
"""
# pyright: reportMissingParameterType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ir.ops import _gated as gated_twin
from .activation import ACTIVATIONS, activate
from .launch import Config, Launch, Plan
from .operator import define
from .spec import Cost
from .triton_spec import Arguments, Case, Form, TritonSpec


@triton.jit
def gated_kernel(
    GATE,
    UP,
    OUT,
    columns,
    gate_stride,
    up_stride,
    out_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    gate = tl.load(GATE + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    out = activate(gate, ACTIVATION) * up
    tl.store(OUT + row * out_stride + at, out.to(OUT.dtype.element_ty), mask=inside)


CONFIGS = (
    Config({"BLOCK": 1024}, num_warps=4, archs=("sm_", "gfx1")),
    Config({"BLOCK": 2048}, num_warps=8, archs=("sm_", "gfx1")),
    Config({"BLOCK": 1024}, num_warps=2, archs=("gfx9",)),
    Config({"BLOCK": 2048}, num_warps=4, archs=("gfx9",)),
)
"""8 values for every lane, which loads them at once; lanes of a warp are 64 on gfx9."""


def plan(
    gate: Tensor, up: Tensor, activation: str, *, config: Config | None = None, arch: str = "sm_80"
) -> Plan:
    """gate, up [..., columns], rows evenly strided; the result is contiguous."""
    columns = gate.shape[-1]
    gates, ups = gate.reshape(-1, columns), up.reshape(-1, columns)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    known = [known for known in CONFIGS if known.serves(arch)]
    chosen = config or known[columns > 4096]
    block = chosen.constants["BLOCK"]
    launch = Launch(
        gated_kernel,
        (triton.cdiv(columns, block), gates.shape[0]),
        {
            "GATE": gates,
            "UP": ups,
            "OUT": out,
            "columns": columns,
            "gate_stride": gates.stride(0),
            "up_stride": ups.stride(0),
            "out_stride": columns,
        },
        {"ACTIVATION": activation},
    )
    return Plan((out,), (launch.with_config(chosen),))


def why_not(arch: str, gate: Tensor, up: Tensor, activation: str) -> str | None:
    if gate.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"its values are {gate.dtype}"
    if activation not in ACTIVATIONS:
        return f"there is no kernel for the activation {activation}"
    if gate.stride(-1) != 1 or up.stride(-1) != 1:
        return "its columns do not lie side by side"
    return None


def cost(gate: Tensor, up: Tensor, activation: str) -> Cost:
    """Both operands and the result once; ten operations a value."""
    return Cost(3 * gate.numel() * gate.element_size(), 10 * gate.numel())


def _small(dtype: torch.dtype, activation: str):
    def make(generator: torch.Generator) -> Arguments:
        both = torch.randn(3, 2 * 700, generator=generator).mul(2).to(dtype)
        return {"gate": both[:, :700], "up": both[:, 700:], "activation": activation}

    return make


def _large() -> Arguments:
    both = torch.empty(4096, 2 * 11008, dtype=torch.bfloat16, device="meta")
    return {"gate": both[:, :11008], "up": both[:, 11008:], "activation": "silu"}


SPEC = TritonSpec(
    name="gated",
    schema="planish::gated_triton(Tensor gate, Tensor up, str activation) -> Tensor",
    serves="gated MLP activations",
    twin=gated_twin,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=(
        *(Case(f"{a} f32", _small(torch.float32, a)) for a in ACTIVATIONS),
        Case("silu bf16", _small(torch.bfloat16, "silu")),
        Case("gelu f16", _small(torch.float16, "gelu")),
    ),
    forms=(Form("silu bf16 4096 x 11008", _large),),
)

define(SPEC)
