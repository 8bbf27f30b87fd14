"""What a Triton kernel declares of itself: its operation, its configurations, its test problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import Config, Plan
from .spec import Cost

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
"""The architectures that planish ships machine code for."""

TRITON = "3.9"
"""The series of Triton that the kernels were verified with."""

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """A small problem with real numbers, for the rungs that compute.

    make: the operation's arguments from a seeded generator. config: tiles to use instead of the
    ones that `plan` would choose. unit: relative rounding of the products (2**-11 for tf32), where
    it is coarser than that of the result's dtype. rungs: "interpret", "ptx" or both; archs: whose
    compiled code is executed. reason: why a rung or an architecture is left out, for the report.
    """

    name: str
    make: Callable[[torch.Generator], Arguments]
    config: Config | None = None
    unit: float = 0.0
    rungs: tuple[str, ...] = ("interpret", "ptx")
    archs: tuple[str, ...] = ("sm_80", "sm_90")
    reason: str = ""


@dataclass(frozen=True)
class Form:
    """Arguments of a realistic size on the meta device: what is compiled, budgeted and costed.

    expects: an instruction family that the inner loop must have ("mma", "int8 mma", "fp8 mma"), or
    "" where the kernel multiplies no matrices. archs: prefixes of the architectures it is for.
    wide: whether some loads must be of 128 bits; not where a kernel reads scattered single values.
    """

    name: str
    make: Callable[[], Arguments]
    expects: str = ""
    archs: tuple[str, ...] = ("",)
    wide: bool = True

    def serves(self, arch: str) -> bool:
        return arch.startswith(self.archs)


@dataclass(frozen=True)
class TritonSpec:
    """A Triton kernel, from its operation down to the figures that hold it to its word.

    name: of the file. schema: of the operator, with namespace. twin: the operation in plain torch:
    any floating dtype, so that float64 arguments give the reference; its results on meta tensors
    are the shape rule. plan: (arguments of the schema by name, config, arch) to a Plan; it reads
    shapes, dtypes and strides, never numbers. configs: the shipped configurations, the autotune
    set. why_not: (arch, arguments) to None, or a sentence that says why the kernel cannot take
    them. cost: (arguments) to the least bytes and the floating-point operations of a call.
    """

    name: str
    schema: str
    serves: str
    twin: Callable[..., Tensor | tuple[Tensor, ...]]
    plan: Callable[..., Plan]
    configs: tuple[Config, ...]
    why_not: Callable[..., str | None]
    cost: Callable[..., Cost]
    cases: tuple[Case, ...]
    forms: tuple[Form, ...]

    @property
    def operator(self) -> str:
        """namespace::name of the operator."""
        return self.schema.split("(", 1)[0]
