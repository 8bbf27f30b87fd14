"""What the matmul kernels of linear layers have in common: rows, result, epilogue, refusals.

A linear layer is activation(x @ W.T + bias) * gate + residual, with x [..., K] and W [N, K].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.ops import _activate
from .activation import ACTIVATIONS
from .epilogue import finish_arguments, standard
from .spec import Cost

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
PRECISIONS = ("ieee", "tf32")

EPILOGUE_SCHEMA = (
    "Tensor? bias=None, Tensor? gate=None, Tensor? residual=None, str activation='none'"
)
"""The part of an operator's schema that `standard` serves."""


@dataclass(frozen=True)
class LinearProblem:
    """One call: rows [M, K] of x, the result to be filled, and the epilogue's arguments.

    out: [..., N], contiguous, in the dtype of x. epilogue: run-time arguments; finish: the
    compile-time ones.
    """

    rows: Tensor
    out: Tensor
    epilogue: Mapping[str, Any]
    finish: Mapping[str, Any]

    @property
    def height(self) -> int:
        return self.rows.shape[0]

    @property
    def width(self) -> int:
        return self.out.shape[-1]

    @property
    def length(self) -> int:
        return self.rows.shape[1]

    def scratch(self, splits: int) -> Tensor:
        """Float32 partial sums [splits, M, N] for `linear_split`."""
        shape = (splits, self.height, self.width)
        return torch.empty(shape, dtype=torch.float32, device=self.rows.device)


def linear_problem(
    x: Tensor,
    width: int,
    standard_operands: Sequence[Tensor | None],
    activation: str,
    finish: Any = standard,
    operands: Sequence[Tensor | None] | None = None,
) -> LinearProblem:
    """x [..., K] with any strides; operands of a generated `finish` replace the standard ones."""
    rows = matrix(x)
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    given = standard_operands if operands is None else operands
    flat = [e if e is None or e.dim() == 1 else e.reshape(-1, e.shape[-1]) for e in given]
    return LinearProblem(rows, out, *finish_arguments(flat, finish, activation))


def matrix(x: Tensor) -> Tensor:
    """[..., K] as [M, K] with its columns side by side; copied only where it must be."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def linear_twin(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """The layer in plain torch: sums in float32 (float64 for float64), rounded once at the end."""
    work = torch.promote_types(x.dtype, torch.float32)
    sums = x.to(work) @ weight.to(work).t()
    return finished(sums, bias, gate, residual, activation).to(x.dtype)


def finished(
    sums: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """The epilogue `standard` in plain torch, in the dtype of the sums."""
    if bias is not None:
        sums = sums + bias.to(sums.dtype)
    if activation != "none":
        sums = _activate(sums, activation)
    if gate is not None:
        sums = sums * gate.to(sums.dtype)
    return sums if residual is None else sums + residual.to(sums.dtype)


def why_not_linear(
    x: Tensor,
    width: int,
    length: int,
    operands: Sequence[Tensor | None],
    activation: str,
    dtypes: Sequence[torch.dtype] = FLOATS,
) -> str | None:
    """What no kernel for linear layers takes: bias [N], gate and residual [..., N]."""
    if x.dtype not in dtypes:
        return f"its activations are {x.dtype}"
    if x.shape[-1] != length:
        return f"its activations have {x.shape[-1]} columns where the weight has {length}"
    if length == 0:
        return "it sums over nothing"
    if activation not in (*ACTIVATIONS, "none"):
        return f"there is no kernel for the activation {activation}"
    bias, *others = operands
    if bias is not None and bias.shape != (width,):
        return f"its bias has the shape {list(bias.shape)}"
    result = (*x.shape[:-1], width)
    for operand in others:
        if operand is not None and operand.shape not in (result, (width,)):
            return f"its epilogue reads a tensor of the shape {list(operand.shape)}"
    return None


def linear_cost(
    x: Tensor, width: int, weight_bytes: int, operands: Sequence[Tensor | None]
) -> Cost:
    """Activations, packed weight, operands and result once; two operations a product."""
    height = math.prod(x.shape[:-1])
    moved = sum(e.numel() * e.element_size() for e in operands if e is not None)
    moved += x.element_size() * height * (x.shape[-1] + width) + weight_bytes
    return Cost(moved, 2 * height * width * x.shape[-1])


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements, also on the meta device."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def off_16_bytes(*tensors: Tensor) -> bool:
    """Whether one starts where wide loads, which a kernel states to be possible, are not."""
    return any(not t.is_meta and t.data_ptr() % 16 != 0 for t in tensors)
