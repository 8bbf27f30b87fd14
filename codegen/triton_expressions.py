"""Arguments of operations as Triton expressions: names, numbers and casts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.pattern import bound_arguments

HALVES = {torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16"}
_TYPES = {
    torch.float32: "tl.float32",
    torch.int64: "tl.int64",
    torch.int32: "tl.int32",
    torch.int16: "tl.int16",
    torch.int8: "tl.int8",
    torch.uint8: "tl.uint8",
    torch.bool: "tl.int1",
}
DTYPES = {**_TYPES, **HALVES}


class Unfusible(Exception):
    """The one sentence that says why an operation cannot be in a generated kernel."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a value of `dtype` has inside a kernel."""
    if dtype in DTYPES:
        return torch.float32 if dtype.is_floating_point else dtype
    raise Unfusible(f"it computes in {dtype}")


@dataclass
class Call:
    """One operation: its node, the names of the values it reads, and where lines go.

    columns: the size of a row, as text. inside: the mask of the tile.
    """

    node: fx.Node
    name: str
    read: Callable[[fx.Node], str]
    line: Callable[[str], None]
    columns: str

    def __post_init__(self) -> None:
        self.given = bound_arguments(self.node)

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.node.meta["val"].dtype)

    def at(self, argument: str, dtype: torch.dtype | None = None) -> str:
        """An argument as an expression of a compute dtype (default: the result's)."""
        return self.value(self.given[argument], dtype or self.dtype)

    def value(self, given: Any, dtype: torch.dtype) -> str:
        if isinstance(given, fx.Node):
            found = given.meta["val"]
            if isinstance(found, Tensor):
                return cast(self.read(given), compute_dtype(found.dtype), dtype)
            # A size: the JIT makes a plain number of it where it is 1, so no method is called.
            return f"({self.read(given)} * 1.0)" if dtype.is_floating_point else self.read(given)
        return literal(given, dtype)

    def common(self, *arguments: str) -> torch.dtype:
        """The compute dtype in which arguments are compared."""
        found = [self._example(self.given[a]) for a in arguments]
        return compute_dtype(torch.result_type(*found))

    def _example(self, given: Any) -> Any:
        if isinstance(given, fx.Node):
            value = given.meta["val"]
            if isinstance(value, Tensor):
                return torch.empty([1] * value.dim(), dtype=value.dtype)
            return 1.0 if isinstance(value, (float, torch.SymFloat)) else 1
        return given


def cast(text: str, source: torch.dtype, to: torch.dtype) -> str:
    """Between compute dtypes, as torch converts."""
    if source == to:
        return text
    if to == torch.bool:
        return f"({text} != 0)"
    return f"{text}.to({_TYPES[to]})"


def literal(value: Any, dtype: torch.dtype) -> str:
    """A Python number in a kernel."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if isinstance(value, bool):
            return str(value) if dtype == torch.bool else str(int(value))
        raise Unfusible(f"it takes {type(value).__name__} {value!r}")
    if not dtype.is_floating_point:
        return str(int(value))
    value = float(value)
    if math.isnan(value) or math.isinf(value):
        return f'float("{value}")'
    return repr(value)
