"""The reference run: float64 on demand, watched, and streamed."""

from __future__ import annotations

import weakref
from typing import Any

import build
import captured
import pytest
import torch
from planish.ir.interpret import run, widen
from planish.ir.pattern import op
from planish.ir.program import Node

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def stack(count: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """`count` linears in a row, each with a weight [6, 6 + place] and one back."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for place in range(count):
        weights[f"{place}.up"] = torch.randn(7 + place, 6, generator=generator)
        weights[f"{place}.down"] = torch.randn(6, 7 + place, generator=generator)

    def body(x: Any, *given: Any) -> Any:
        for up, down in zip(given[::2], given[1::2], strict=True):
            x = op.tanh(op.linear(op.linear(x, up), down))
        return x

    return body, weights


def test_equals_the_model_bit_for_bit() -> None:
    sample, program = captured.sample("llama", "sdpa"), captured.fresh("llama", "sdpa")
    inputs = sample.other_inputs()
    with torch.no_grad():
        expected = sample.model(**inputs).logits
    assert torch.equal(program(**inputs)["logits"], expected)


def test_float64_widens_everything() -> None:
    """Inputs, weights, casts, constants made inside: nothing floating is narrower."""

    def body(x: Any, w: Any) -> Any:
        y = op.linear(op.to.dtype(x, torch.float16), op.to.dtype(w, torch.float16))
        y = op._to_copy(y, dtype=torch.bfloat16)
        made = op.full([6, 1], 0.1, dtype=torch.float32)
        z = op.add(op.sum(made), y)
        return z, op.arange.default(3), op.scalar_tensor.default(0.5), op.gt(x, 0)

    w = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    program = build.program(body, {"x": X}, {"w": w})
    seen: list[torch.dtype] = []
    wide, count, half, mask = run(
        program, [X], float64=True, watch=lambda _, value: seen.append(value.dtype)
    )
    floating = [dtype for dtype in seen if dtype.is_floating_point]
    assert floating and set(floating) == {torch.float64}
    assert (count.dtype, half.dtype, mask.dtype) == (torch.int64, torch.float64, torch.bool)
    exact = torch.tensor(0.1, dtype=torch.float64) * 6 + X.double() @ w.double().T
    assert torch.allclose(wide, exact, rtol=0, atol=64 * torch.finfo(torch.float64).eps)
    assert run(program, [X])[0].dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_float64_restores_the_default_dtype_after_an_error() -> None:
    program = build.program(op.relu, {"x": X})
    program.results[0].args = ("no tensor",)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        run(program, [X], float64=True)
    assert torch.get_default_dtype() == torch.float32


def test_widen_leaves_integers_alone() -> None:
    assert widen(torch.float16) is torch.float64
    assert widen(torch.int8) is torch.int8
    assert widen(3.5) == 3.5
    ids = torch.tensor([1, 2])
    assert widen(ids) is ids


def test_watch_sees_every_call_in_order() -> None:
    body, weights = stack(2)
    program = build.program(body, {"x": X}, weights)
    seen: list[Node] = []
    out = run(program, [X], watch=lambda node, value: seen.append(node))
    assert seen == [n for n in program.graph.nodes if n.op == "call_function"]
    assert out[0].shape == (4, 6)


@pytest.mark.parametrize("float64", [False, True])
def test_weights_and_values_are_dropped_after_their_last_reader(float64: bool) -> None:
    body, weights = stack(8)
    program = build.program(body, {"x": X}, weights)
    alive: list[weakref.ref[torch.Tensor]] = []
    most_weights = most_values = 0
    values: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        made = weights[name].double() if float64 else weights[name].clone()
        alive.append(weakref.ref(made))
        return made

    def watch(node: Node, value: Any) -> None:
        nonlocal most_weights, most_values
        values.append(weakref.ref(value))
        most_weights = max(most_weights, sum(ref() is not None for ref in alive))
        most_values = max(most_values, sum(ref() is not None for ref in values))

    run(program, [X], float64=float64, watch=watch, weight=read)
    assert len(alive) == 16
    assert most_weights == 1
    assert most_values == 2  # a value and the one it was made of
