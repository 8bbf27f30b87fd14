"""A node of a lowered graph that a Triton kernel computes, with its generated epilogue if any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..kernels.triton_spec import TritonSpec
from .region import Region


@dataclass(eq=False)
class KernelCall:
    """The target of such a node: called with the operator's arguments by name.

    planner: module whose `plan` is called, where that is not the kernel's own.
    prologue: operations that make x of the x given and `sources`, before the product.
    epilogue: operations on the result that the kernel does before it stores; its further inputs
    come as `operands`. On the CPU twin and operations run, so a lowered graph runs anywhere.
    """

    spec: TritonSpec
    epilogue: Region | None = None
    prologue: Region | None = None
    planner: str = ""

    @property
    def __name__(self) -> str:
        return self.spec.name

    def __call__(
        self,
        *,
        operands: tuple[Tensor, ...] = (),
        sources: tuple[Tensor, ...] = (),
        **arguments: Any,
    ) -> Any:
        if self.prologue is not None:
            arguments["x"] = self.prologue(arguments["x"], *sources)
        result = self.spec.twin(**arguments)
        return result if self.epilogue is None else self.epilogue(result, *operands)
