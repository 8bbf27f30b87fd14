"""What a kernel declares of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one call moves and computes: bytes read and written, floating-point operations."""

    nbytes: int
    flops: int


@dataclass(frozen=True)
class KernelSpec:
    """A kernel as targets see it.

    name: of the file and of the operator `planish::name`. device: where it runs. serves: one
    sentence for people. why_not: None where it can take a case, or a sentence that says why not,
    to be read after "stays dense because". cost: the model of one call.
    """

    name: str
    device: str
    serves: str
    why_not: Callable[..., str | None]
    cost: Callable[..., Cost]
    twin: Callable[..., Any]
