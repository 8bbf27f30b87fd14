"""Values by key, bounded in memory: what goes over a budget lies in a temporary file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEMORY = 1 << 30
"""Bytes of values that stay in memory."""


class ValueStore:
    """Values by key: in memory up to a budget, past it in a temporary file that is mapped back."""

    def __init__(self, memory: int = MEMORY) -> None:
        self._left = memory
        self._kept: dict[Any, Any] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __setitem__(self, key: Any, value: Any) -> None:
        size = value.nbytes if isinstance(value, Tensor) else 0
        if size > self._left:
            value = self._spilled(value)
        else:
            self._left -= size
        self._kept[key] = value

    def _spilled(self, value: Tensor) -> Tensor:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="planish-values-")
        file = Path(self._folder.name) / str(len(self._kept))
        mapped = torch.from_file(str(file), True, value.numel(), dtype=value.dtype)
        mapped.view(value.shape).copy_(value)
        return mapped.view(value.shape)

    def __getitem__(self, key: Any) -> Any:
        return self._kept[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._kept
