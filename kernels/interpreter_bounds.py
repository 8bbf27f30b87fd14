"""Where the pointers of a launch may point: into the tensor that they were given for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..ir.errors import PlanishError
from .interpreter_numbers import Array


class OutOfBounds(PlanishError):
    """A kernel reads or writes an address outside of the tensor that the pointer came from."""

    def located(self, line: str) -> OutOfBounds:
        """The same, with the line of the kernel that does it."""
        where = ", ".join(part for part in (line, self.where) if part)
        return OutOfBounds(
            self.what, where=where, expected=self.expected, found=self.found, fix=self.fix
        )


@dataclass(frozen=True)
class Extent:
    """The bytes low <= address < high that belong to the argument described by text."""

    text: str
    start: int
    low: int
    high: int

    def check(self, addresses: Array, nbytes: int, what: str, program: tuple[int, ...]) -> None:
        """Raises OutOfBounds unless all of the addresses, of elements of nbytes, lie inside."""
        if not addresses.size:
            return
        first, last = int(addresses.min()), int(addresses.max())
        if self.low <= first and last + nbytes <= self.high:
            return
        places = addresses.astype(np.int64) - self.start
        outside = (places < self.low - self.start) | (places + nbytes > self.high - self.start)
        where = int(places[outside].flat[0]) // nbytes
        raise OutOfBounds(
            f"{what} through {self.text} leaves it: "
            f"{int(outside.sum())} of {addresses.size} active addresses lie outside",
            where=f"program {program}, the first at element {where}",
            expected=f"elements 0 to {(self.high - self.start) // nbytes - 1}",
            fix="mask it, or pass the tensor that it means to reach",
        )


def extent_of(name: str, tensor: Any, strict: bool) -> Extent:
    """What a tensor argument may be used for: its own elements, first to last, or its storage.

    tensor: a Tensor, or Triton's wrapper that reads one as another type. strict: the view's extent
    instead of the whole storage's. A view's rows may have gaps; what lies in them counts as inside.
    """
    tensor = tensor if isinstance(tensor, Tensor) else tensor.base
    text = f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    start = tensor.data_ptr()
    if strict:
        return Extent(text, start, start, start + _reach(tensor) * tensor.element_size())
    storage = tensor.untyped_storage()
    return Extent(text, start, storage.data_ptr(), storage.data_ptr() + storage.nbytes())


def _reach(tensor: Tensor) -> int:
    """Elements from the first to the last, both counted."""
    if tensor.numel() == 0:
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps)
