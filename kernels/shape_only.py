"""Whether a twin is asked for shapes alone: twins with loops answer at once then."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_WRITTEN_OUT: ContextVar[bool] = ContextVar("planish_twin_written_out", default=False)


def shape_only(tensor: Tensor) -> bool:
    """A tensor without numbers: on the meta device, or inside a capture of the operator."""
    return tensor.is_meta or (isinstance(tensor, FakeTensor) and not _WRITTEN_OUT.get())


@contextlib.contextmanager
def written_out() -> Generator[None]:
    """Capture the twin itself, operation by operation, instead of the operator's shapes."""
    token = _WRITTEN_OUT.set(True)
    try:
        yield
    finally:
        _WRITTEN_OUT.reset(token)
