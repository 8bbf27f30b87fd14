"""Models whose forward gathers its arguments are captured with free axes like any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planish.ir.capture import capture_module
from planish.ir.named_arguments import named_arguments
from torch import Tensor, nn


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.table(ids) * mask[..., None]


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs)


class Half(Wrapper):
    def forward(self, ids: Tensor, **kwargs: Any) -> Tensor:
        return self.inner(ids, **kwargs)


IDS = torch.arange(6).reshape(2, 3)
MASK = torch.ones(2, 3, dtype=torch.int64)
OTHER = torch.arange(10).reshape(2, 5), torch.ones(2, 5, dtype=torch.int64)


@pytest.mark.parametrize("kind", [Wrapper, Half])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_axes_are_free_however_it_is_called(kind: type[Wrapper], count: int) -> None:
    if kind is Half and count == 2:
        count = 1
    model = kind()
    names = ["ids", "mask"]
    args = (IDS, MASK)[:count]
    kwargs = dict(zip(names[count:], (IDS, MASK)[count:], strict=True))
    program = capture_module(model, args, kwargs)
    assert [spec.shape for spec in program.input_specs] == [(None, None)] * 2
    assert list(program.weights) == ["inner.table.weight"]
    rest = dict(zip(names[count:], OTHER[count:], strict=True))
    assert torch.equal(program(*OTHER[:count], **rest), model(*OTHER[:count], **rest))
    assert "forward" not in vars(model)


def test_a_forward_of_the_instance_comes_back() -> None:
    model = Wrapper()
    own = model.forward
    model.forward = own
    with named_arguments(model, (IDS,), {"mask": MASK}):
        assert model.forward is not own
    assert model.forward is own


def test_named_parameters_are_left_alone() -> None:
    model = Half()
    before = model.forward
    with named_arguments(model, (IDS,), {}):
        assert model.forward == before
