"""A launch of a Triton kernel that is decided but not made, so that it can go several ways.

The same launch runs on a GPU, runs in Triton's interpreter, is compiled ahead of time for an
architecture that is not there, or is executed from its compiled code on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

POINTERS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
"""Triton's names of element types."""

_ALIGNED = 16


@dataclass(frozen=True)
class Config:
    """Tile sizes, warps and pipeline depth that a kernel ships.

    constants: compile-time values by parameter name. archs: prefixes of the architectures that it
    is meant for ("sm_9" serves sm_90; "" all).
    """

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    archs: tuple[str, ...] = ("",)

    def serves(self, arch: str) -> bool:
        return arch.startswith(self.archs)

    @property
    def name(self) -> str:
        """For reports and budgets: BM=64,BN=64,w4,s3."""
        tiles = [f"{name}={value}" for name, value in sorted(self.constants.items())]
        return ",".join([*tiles, f"w{self.num_warps}", f"s{self.num_stages}"])


@dataclass(frozen=True)
class Launch:
    """One launch: kernel[grid](**args, **constants).

    kernel: a function under @triton.jit. grid: one to three sizes. args: run-time arguments by
    parameter name: tensors, ints, floats, or None for a pointer that is not given (it becomes a
    compile-time None). constants: the tl.constexpr parameters by name.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    num_warps: int = 4
    num_stages: int = 3

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def with_config(self, config: Config) -> Launch:
        return replace(
            self,
            constants={**self.constants, **config.constants},
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def run(self) -> None:
        """Launch on the device of the arguments, or in the interpreter where that is on."""
        if 0 in self.grid:
            return
        self.kernel[self.grid](**self.args, **self.constants, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told: the fusion of multiply and add is stated, not left to it."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    def signature(self) -> dict[str, str]:
        """Triton's type of every parameter, in the kernel's order; "constexpr" where fixed."""
        return {name: self._type(name) for name in self.kernel.arg_names}

    def aligned(self) -> tuple[str, ...]:
        """Parameters that the JIT would mark divisible by 16: pointers and integers alike."""
        return tuple(name for name in self.kernel.arg_names if self._is_aligned(name))

    def fixed(self) -> dict[str, Any]:
        """The compile-time values: the constants, and None for the pointers not given."""
        absent = {name: None for name, value in self.args.items() if value is None}
        return {**absent, **self.constants}

    def _type(self, name: str) -> str:
        if name in self.constants:
            return "constexpr"
        match self.args[name]:
            case None:
                return "constexpr"
            case Tensor() as tensor:
                return "*" + POINTERS[tensor.dtype]
            case bool():
                raise TypeError(f"{self.name}: {name} is a bool; pass it as a constant")
            case int() as number:
                return "i32" if -(2**31) <= number < 2**31 else "i64"
            case float():
                return "fp32"
            case other:
                raise TypeError(f"{self.name}: {name} is a {type(other).__name__}")

    def _is_aligned(self, name: str) -> bool:
        if name in self.constants:
            return False
        value = self.args[name]
        if isinstance(value, Tensor):
            return value.is_meta or value.data_ptr() % _ALIGNED == 0
        return isinstance(value, int) and value % _ALIGNED == 0


@dataclass(frozen=True)
class Plan:
    """What a call of an operation does: tensors made for its results, and the launches in order.

    outputs: in the order of the operation's schema. scratch: further tensors, kept alive.
    """

    outputs: tuple[Tensor, ...]
    launches: tuple[Launch, ...]

    def run(self) -> Tensor | tuple[Tensor, ...]:
        """Make the launches; returns the results as the operation does."""
        for launch in self.launches:
            launch.run()
        return self.outputs[0] if len(self.outputs) == 1 else self.outputs
