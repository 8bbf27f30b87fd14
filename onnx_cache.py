"""The KV cache of a decoder in onnxruntime: buffers that the session reads and writes in place.

Both forms bind the cache to the session's inputs and outputs once a run (I/O binding), so nothing
of it passes through Python or is copied on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

FIRST_CAPACITY = 1024
"""Tokens; memory is used only as far as it is written, and the buffers grow by doubling."""

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class CachePorts:
    """Names of the session's cache inputs and outputs, key and value of each layer in turn.

    shapes: (heads, width) of each.
    """

    past: Sequence[str]
    present: Sequence[str]
    shapes: Sequence[tuple[int, int]]
    dtype: Any

    def empty(self, length: int) -> list[np.ndarray]:
        """Buffers [1, heads, length, width]; the memory is not touched."""
        return [np.empty((1, heads, length, width), self.dtype) for heads, width in self.shapes]


class OnnxCache(Protocol):
    """Where the keys and values of one text lie."""

    def bind(self, binding: Any, length: int, total: int) -> None:
        """Before a run that takes the text from `length` to `total` tokens."""
        ...

    def keep(self, binding: Any) -> None:
        """After a run."""
        ...

    def rewind(self, length: int) -> None:
        """Only the first `length` tokens count from now on."""
        ...

    def select(self, begin: int, places: Sequence[int]) -> None:
        """The first `begin` tokens stay, and after them the tokens `begin + place` for places."""
        ...


class SharedCache:
    """One buffer for past and present: attention appends to it in place; going back is free."""

    def __init__(self, ports: CachePorts, context: int | None) -> None:
        self._ports, self._context = ports, context
        self._buffers: list[np.ndarray] = []
        self._bound = False

    @property
    def capacity(self) -> int:
        """Tokens that the buffers have room for."""
        return self._buffers[0].shape[2] if self._buffers else 0

    def bind(self, binding: Any, length: int, total: int) -> None:
        if total > self.capacity:
            self._grow(length, total)
        if self._bound:
            return
        names = zip(self._ports.past, self._ports.present, self._buffers, strict=True)
        for past, present, buffer in names:
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        self._bound = True

    def keep(self, binding: Any) -> None:
        pass

    def rewind(self, length: int) -> None:
        pass

    def select(self, begin: int, places: Sequence[int]) -> None:
        chosen = [begin + place for place in places]
        for buffer in self._buffers:
            buffer[:, :, begin : begin + len(chosen)] = buffer[:, :, chosen]

    def _grow(self, length: int, total: int) -> None:
        wanted = max(total, 2 * self.capacity, FIRST_CAPACITY)
        if self._context is not None:
            wanted = max(total, min(wanted, self._context))
        old, self._buffers = self._buffers, self._ports.empty(wanted)
        for before, after in zip(old, self._buffers, strict=False):
            after[:, :, :length] = before[:, :, :length]
        self._bound = False


class GrowingCache:
    """The outputs of a run are the inputs of the next one. Going back copies what stays."""

    def __init__(self, ports: CachePorts) -> None:
        self._ports = ports
        self._values: list[Any] = []
        self.rewind(0)

    def bind(self, binding: Any, length: int, total: int) -> None:
        for name, value in zip(self._ports.past, self._values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in self._ports.present:
            binding.bind_output(name, "cpu")

    def keep(self, binding: Any) -> None:
        self._values = binding.get_outputs()[: len(self._ports.present)]  # they are bound first

    def rewind(self, length: int) -> None:
        if length == 0:
            self._keep_arrays(self._ports.empty(0))
        else:
            self._keep_arrays([value.numpy()[:, :, :length] for value in self._values])

    def select(self, begin: int, places: Sequence[int]) -> None:
        chosen = [*range(begin), *(begin + place for place in places)]
        self._keep_arrays([value.numpy()[:, :, chosen] for value in self._values])

    def _keep_arrays(self, arrays: Sequence[np.ndarray]) -> None:
        whole = [np.ascontiguousarray(array) for array in arrays]
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in whole]
