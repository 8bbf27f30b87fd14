"""A linear layer of experts: every token times the weight of the expert that it was routed to.

Tokens are read in the order that `route_experts` made, whose blocks have one expert each; results
are written at their pair, so that nothing has to be sorted back. Gale et al. 2022, "MegaBlocks".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .activation import ACTIVATIONS
from .decode_shapes import alignment
from .epilogue import finish_arguments, standard
from .grouped_cases import CASES, FORMS
from .grouped_tiles import grouped_gemm_kernel
from .launch import Config, Launch, Plan
from .operator import define
from .shape_only import shape_only
from .spec import Cost
from .triton_spec import TritonSpec

CONFIGS = (
    Config({"BN": 128, "BK": 64}, num_warps=8, num_stages=3, archs=("sm_8", "sm_9", "sm_10")),
    Config({"BN": 64, "BK": 64}, num_warps=4, num_stages=3, archs=("sm_",)),
    Config({"BN": 64, "BK": 32}, num_warps=4, num_stages=2),
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    places: Tensor,
    owners: Tensor,
    pairs: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(x[row] @ weight[e].T + bias[e]) * gate[pair] + residual[pair], e of each pair.

    x: [rows, in], where pair p reads row p // (pairs / rows): rows is the tokens for the first
    layer of an MLP, pairs for the second. weight: [experts, out, in]; bias: [experts, out]; gate,
    residual: [pairs, out]. places, owners: as `route_experts` gives them. Returns [pairs, out] in
    x's dtype; a pair that no place names gives zeros here and anything on a GPU.
    """
    if shape_only(x):
        return torch.empty((pairs, weight.shape[1]), dtype=x.dtype, device=x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    block = places.shape[0] // max(owners.shape[0], 1)
    share = pairs // max(x.shape[0], 1)
    out = torch.zeros((pairs + 1, weight.shape[1]), dtype=wide, device=x.device)
    for b in range(owners.shape[0]):
        pair = places[b * block : (b + 1) * block].to(torch.int64)
        row = (pair // max(share, 1)).clamp_max(x.shape[0] - 1)
        owner = max(int(owners[b]), 0)
        made = x[row] @ weight[owner].transpose(0, 1)
        made = made.to(wide) if bias is None else made.to(wide) + bias[owner].to(wide)
        out = out.index_copy(0, torch.where(owners[b] < 0, pairs, pair), made)
    out = _activated(out[:pairs], activation)
    out = out if gate is None else out * gate.to(wide)
    return (out if residual is None else out + residual.to(wide)).to(x.dtype)


def _activated(x: Tensor, name: str) -> Tensor:
    """The activations that the kernel knows, by the names of `ir.ops`."""
    functional = torch.nn.functional
    match name:
        case "none":
            return x
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "sigmoid":
            return torch.sigmoid(x)
        case _:
            return {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}[
                name
            ](x)


def plan(
    x: Tensor,
    weight: Tensor,
    places: Tensor,
    owners: Tensor,
    pairs: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    *,
    finish: Any = standard,
    operands: Sequence[Tensor | None] | None = None,
    config: Config | None = None,
    arch: str = "sm_80",
) -> Plan:
    """The rows of a tile are the block of the routing. operands: of another `finish`, by pair."""
    inputs, outputs = x.shape[1], weight.shape[1]
    chosen = config or default_config(x, places, owners, arch)
    out = torch.empty((pairs, outputs), dtype=x.dtype, device=x.device)
    extra = operands if operands is not None else (None, gate, residual)
    args, constants = finish_arguments(extra, finish, activation)
    args |= {
        "X": x,
        "W": weight,
        "BIAS": bias,
        "PLACES": places,
        "OWNERS": owners,
        "OUT": out,
        "pairs": pairs,
        "inputs": inputs,
        "outputs": outputs,
        "share": pairs // max(x.shape[0], 1),
        "x_row": x.stride(0),
        "w_expert": weight.stride(0),
        "w_row": weight.stride(1),
        "bias_expert": 0 if bias is None else bias.stride(0),
    }
    constants |= {
        "PRECISION": "ieee",
        "IN_DIVISOR": math.gcd(inputs, 16),
        "OUT_DIVISOR": math.gcd(outputs, 16),
        "X_ALIGN": alignment(x),
        "W_ALIGN": alignment(weight),
        "O_ALIGN": alignment(out),
        "BM": block_of(places, owners),
    }
    blocks = owners.shape[0] if pairs else 0
    grid = (triton.cdiv(outputs, chosen.constants["BN"]), blocks)
    return Plan((out,), (Launch(grouped_gemm_kernel, grid, args, constants).with_config(chosen),))


def block_of(places: Tensor, owners: Tensor) -> int:
    """Rows of a block."""
    return places.shape[0] // max(owners.shape[0], 1)


def default_config(x: Tensor, places: Tensor, owners: Tensor, arch: str) -> Config:
    """Wide tiles where blocks are tall; float32 has twice the bytes and no tensor cores."""
    served = [config for config in CONFIGS if config.serves(arch)]
    if x.dtype == torch.float32:
        return served[-1]
    return served[0] if block_of(places, owners) >= 64 else served[-2:][0]


def why_not(
    arch: str,
    x: Tensor,
    weight: Tensor,
    places: Tensor,
    owners: Tensor,
    pairs: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> str | None:
    if x.dtype not in _FLOATS or weight.dtype != x.dtype:
        return f"its rows are {x.dtype} and its weights {weight.dtype}"
    if activation != "none" and activation not in ACTIVATIONS:
        return f"there is no kernel for the activation {activation}"
    if places.dtype != torch.int32 or owners.dtype != torch.int32:
        return "its places and owners are not int32"
    if block_of(places, owners) not in (16, 32, 64, 128) and pairs:
        return f"its blocks have {block_of(places, owners)} rows"
    if pairs and (not x.shape[0] or pairs % x.shape[0]):
        return f"{pairs} pairs are no multiple of {x.shape[0]} rows"
    if any(t is not None and t.shape[-1] > 1 and t.stride(-1) != 1 for t in (x, weight, bias)):
        return "its columns do not lie side by side"
    return None


def cost(
    x: Tensor,
    weight: Tensor,
    places: Tensor,
    owners: Tensor,
    pairs: int,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Cost:
    """Rows, results and operands once, and the weight of each expert that there is a pair for."""
    experts, outputs, inputs = weight.shape
    moved = x.numel() + pairs * outputs * (1 + (gate is not None) + (residual is not None))
    moved += min(experts, pairs) * outputs * (inputs + (bias is not None))
    return Cost(moved * x.element_size(), 2 * pairs * outputs * inputs)


SPEC = TritonSpec(
    name="grouped_gemm",
    schema="planish::grouped_gemm(Tensor x, Tensor weight, Tensor places, Tensor owners, "
    "SymInt pairs, Tensor? bias=None, Tensor? gate=None, Tensor? residual=None, "
    'str activation="none") -> Tensor',
    serves="linear layers of experts",
    twin=grouped_gemm,
    plan=plan,
    configs=CONFIGS,
    why_not=why_not,
    cost=cost,
    cases=CASES,
    forms=FORMS,
)

define(SPEC)
