"""Adapters by the form that suits the rows of a call: a program a row, or tiles of sorted rows.

A tile reads an adapter once for all of its rows (Sheng et al. 2023, "S-LoRA", sec. 5); a few rows
would leave most of a tile empty, and make too few programs to fill a GPU.
"""

from __future__ import annotations

from torch import Tensor

from .launch import Plan
from .lora import plan as lora_plan

FEW = 16
"""Up to how many rows each is a program of its own: half of the smallest tile."""


def plan(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    adapters: Tensor,
    order: Tensor,
    *,
    arch: str = "sm_80",
) -> Plan:
    """`planish::lora` of any number of rows; `order` is read where there are many."""
    many = adapters.shape[0] > FEW
    return lora_plan(y, x, a, b, scale, adapters, order if many else None, arch=arch)
