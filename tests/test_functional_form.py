"""The functional form that is put together call by call is the one that torch traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import captured
import planish.ir.capture
import pytest
import torch
import zoo
from planish.ir.capture import capture_module
from planish.ir.functional_form import functional_form
from planish.ir.program import Program
from planish.ir.text import program_text
from torch import Tensor, nn
from torch.export import Dim, export


def _parts(program: Program, strides: bool = True) -> list[Any]:
    """All that a capture says: text, modules, sources, strides, weights, inputs.

    Without strides where their formulas differ: Min(48, 48 n) and 48 are one for every n.
    """
    program.graph.eliminate_dead_code()  # torch leaves some sizes that nobody reads
    values = [(node.meta, node.meta.get("val")) for node in program.graph.nodes]
    told = [
        (meta.get("module"), meta.get("stack_trace"), strides and str(_strides(value)))
        for meta, value in values
    ]
    weights = {name: tuple(program.weights.shape(name)) for name in program.weights}
    names = [node.name for node in program.inputs]
    return [program_text(program, True), told, weights, program.weights.aliases, names]


def _strides(value: Any) -> Any:
    return value.stride() if isinstance(value, Tensor) else ()


def _both(
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    args: Any,
    kwargs: Any = None,
    shapes: Any = None,
    strides: bool = True,
) -> tuple[list[Any], list[Any], bool]:
    """The capture put together, the capture traced, and whether the first was possible."""
    made: list[bool] = []

    def watched(exported: Any) -> Any:
        graph = functional_form(exported)
        made.append(graph is not None)
        return graph

    def never(exported: Any) -> None:
        return None

    monkeypatch.setattr(planish.ir.capture, "functional_form", watched)
    put_together = capture_module(model, args, kwargs, shapes)
    monkeypatch.setattr(planish.ir.capture, "functional_form", never)
    traced = capture_module(model, args, kwargs, shapes)
    assert put_together.metadata == traced.metadata
    return _parts(put_together, strides), _parts(traced, strides), all(made)


class Apply(nn.Module):
    """A function of the input, and a weight [3, 4] and buffer [4] to use in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.arange(12.0).reshape(3, 4) / 7)
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


_SMALL: dict[str, Callable[..., Any]] = {
    "contiguous copies": lambda m, x: x.transpose(1, 2).contiguous().transpose(1, 2) @ m.weight,
    "contiguous is idle": lambda m, x: (x + 1).contiguous().to(torch.float32) * 2,
    "reshape copies": lambda m, x: x.mT.reshape(x.shape[0], x.shape[1], 3) @ m.weight,
    "chunks": lambda m, x: torch.cat([part.neg() for part in x.chunk(2, -1)], -1),
    "one of two results": lambda m, x: torch.max(x, -1).values - torch.split(x, 1, -1)[0][..., 0],
    "equal arguments": lambda m, x: (x * x) + (x * (x + 1)),
    "dropout of nothing": lambda m, x: nn.functional.dropout(x + m.shift[:3], 0.3, training=False),
    "an output twice, an input, a view": lambda m, x: (x, x[0], x.sin(), (x + 1, x[0])),
    "half precision": lambda m, x: x.half().float() @ m.weight + m.shift,
    "detached": lambda m, x: x.detach().cos().detach() + m.weight.detach().sum(),
    "a list of tensors": lambda m, x: torch.stack([x, x.flip(-1), x], 1).permute(0, 2, 1, 3),
}
_WITH_SIZES: dict[str, Callable[..., Any]] = {
    "a quotient": lambda m, x: x.sum(1) / x.shape[1] + x.new_ones(x.shape[0], 3),
    "a flattened product": lambda m, x: x.flatten(0, 1) @ m.weight,
    "an inferred product": lambda m, x: (x @ m.weight).reshape(-1, 2) + x.shape[0] * x.shape[1],
}


@pytest.mark.parametrize("name", _SMALL)
def test_small_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-1, 1, 30).reshape(2, 5, 3)
    ours, theirs, possible = _both(monkeypatch, Apply(_SMALL[name]), (x,))
    assert ours == theirs
    assert possible


@pytest.mark.parametrize("name", _WITH_SIZES)
def test_sizes_that_are_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every axis free: put together, or left to torch, the capture is the same."""
    x = torch.linspace(-1, 1, 30).reshape(2, 5, 3)
    shapes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    ours, theirs, _ = _both(monkeypatch, Apply(_WITH_SIZES[name]), (x,), shapes=shapes)
    assert ours == theirs


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x + 1).add_(2) * 3,
        lambda m, x: (x * 1).masked_fill_(x > 0, 0.0),
        lambda m, x: x[torch.nonzero(x[:, 0, 0] > 0)[:, 0]].sum(),
    ],
    ids=["add_", "masked_fill_", "nonzero"],
)
def test_what_depends_on_more_than_the_call_is_left_to_torch(function: Callable[..., Any]) -> None:
    x = torch.linspace(-1, 1, 30).reshape(2, 5, 3)
    exported = export(Apply(function), (x,), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert functional_form(exported) is None


def test_one_tiny_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = captured.sample("llama", "sdpa")
    ours, theirs, possible = _both(monkeypatch, sample.model, sample.args, sample.kwargs)
    assert ours == theirs
    assert possible


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for attention in zoo.ARCHITECTURES[name].attentions:
        sample = captured.sample(name, attention)
        strides = name != "gpt2"
        ours, theirs, _ = _both(
            monkeypatch, sample.model, sample.args, sample.kwargs, strides=strides
        )
        assert ours == theirs
