"""The least time that a call could take on a GPU: bytes by bandwidth, operations by peak rate.

The roofline of Williams, Waterman and Patterson 2009. Every figure from here is a bound, not
measured: no kernel attains both peaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .spec import Cost

LABEL = "bound, not measured"


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes a second. rates: operations a second without sparsity by family of matrix
    instructions ("" for float32 without any); a family that is absent does not exist there.
    """

    name: str
    arch: str
    bandwidth: float
    rates: Mapping[str, float]
    source: str


GPUS = (
    Gpu(
        "A100",
        "sm_80",
        2.039e12,
        {"": 19.5e12, "mma": 312e12, "int8 mma": 624e12},
        "NVIDIA A100 80 GB SXM data sheet",
    ),
    Gpu(
        "H100",
        "sm_90",
        3.35e12,
        {"": 66.9e12, "mma": 989.4e12, "int8 mma": 1978.9e12, "fp8 mma": 1978.9e12},
        "NVIDIA H100 SXM data sheet and architecture paper",
    ),
    Gpu(
        "B200",
        "sm_100",
        8.0e12,
        {"": 80e12, "mma": 2250e12, "int8 mma": 4500e12, "fp8 mma": 4500e12},
        "NVIDIA HGX B200 data sheet (1,000 W)",
    ),
    Gpu(
        "MI300X",
        "gfx942",
        5.3e12,
        {"": 163.4e12, "mma": 1307.4e12, "int8 mma": 2614.9e12, "fp8 mma": 2614.9e12},
        "AMD Instinct MI300X data sheet",
    ),
)


@dataclass(frozen=True)
class Ideal:
    """seconds: no call can be faster; by: "memory" or "arithmetic"; label: says that it is one."""

    gpu: str
    seconds: float
    by: str
    label: str = LABEL


def ideal_time(cost: Cost, gpu: Gpu, family: str) -> Ideal | None:
    """Of a call that moves and computes what `cost` says, with the family's instructions; None
    where the GPU does not have them.
    """
    if family not in gpu.rates:
        return None
    memory, arithmetic = cost.nbytes / gpu.bandwidth, cost.flops / gpu.rates[family]
    return Ideal(
        gpu.name, max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"
    )


def intensity(cost: Cost) -> float:
    """Operations a byte."""
    return cost.flops / cost.nbytes if cost.nbytes else 0.0
