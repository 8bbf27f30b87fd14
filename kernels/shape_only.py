"""Whether a twin is asked for shapes alone: twins with loops answer at once then."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def shape_only(tensor: Tensor) -> bool:
    """A tensor without numbers: on the meta device, or inside a capture."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)
