"""What a weight can be kept as: a dense tensor, an encoded one, or a recipe over other entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class EncodedTensor(Protocol):
    """What a number format leaves behind: see `planish.ir.formats.Encoded`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def decode(self) -> Tensor: ...

    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class Derived:
    """A dense weight computed from others on reading, e.g. the stacked rows of q, k and v.

    compute: called with the dense sources; returns a tensor of `shape` and `dtype`.
    """

    sources: tuple[Tensor | EncodedTensor | Derived, ...]
    compute: Callable[..., Tensor]
    shape: torch.Size
    dtype: torch.dtype
    label: str

    def decode(self) -> Tensor:
        return self.compute(*(dense(source) for source in self.sources))

    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


Entry = Tensor | EncodedTensor | Derived


def dense(entry: Entry) -> Tensor:
    """The entry as a dense tensor of its shape and dtype; a stored tensor is not copied."""
    return entry if isinstance(entry, Tensor) else entry.decode()


def entry_bytes(entry: Entry) -> int:
    """Bytes of the entry as it is kept."""
    return entry.numel() * entry.element_size() if isinstance(entry, Tensor) else entry.nbytes()
