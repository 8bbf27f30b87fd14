"""Hypothesis strategy: small random programs of pointwise operations, linears and views."""

from __future__ import annotations

from typing import Any

import build
import torch
from hypothesis import strategies as st
from planish.ir.pattern import op
from planish.ir.program import Node, Program
from torch import Tensor

ROWS, WIDTHS = 4, (3, 5)
_UNARY = (op.relu, op.neg, op.silu, op.tanh, op.abs)
_BINARY = (op.add, op.mul, op.sub, op.maximum)

Step = tuple[str, int, int, int]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Step], list[int]]:
    """What to compute (kind, which, first, second operand) and which values to return."""
    one = st.tuples(
        st.sampled_from(("unary", "binary", "linear", "scalar", "view")),
        st.integers(0, 7),
        st.integers(0, 40),
        st.integers(0, 40),
    )
    made = draw(st.lists(one, min_size=1, max_size=14))
    return made, draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))


def inputs(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(ROWS, width, generator=generator) for width in WIDTHS]


def program(made: tuple[list[Step], list[int]]) -> Program:
    """Values have 3 or 5 channels; linears lead from one to the other, so none is square."""
    generator = torch.Generator().manual_seed(9)
    weights: dict[str, Any] = {
        f"{name}.{wide}": torch.randn(8 - wide, wide, generator=generator)
        for name in ("a", "b")
        for wide in WIDTHS
    }
    given = dict(zip(("x", "y"), inputs(), strict=True))

    def body(*nodes: Node) -> list[Node]:
        values, held = list(nodes[:2]), dict(zip(weights, nodes[2:], strict=True))
        for kind, which, first, second in made[0]:
            a = values[first % len(values)]
            values.append(_step(kind, which, a, values[second % len(values)], held))
        return [values[place % len(values)] for place in made[1]]

    return build.program(body, given, weights, free=False)


def _step(kind: str, which: int, a: Node, b: Node, held: dict[str, Node]) -> Node:
    wide = int(a.meta["val"].shape[-1])
    if kind == "linear":
        return op.linear(a, held[f"{'ab'[which % 2]}.{wide}"])
    if kind == "scalar":
        return op.mul(a, (0.5, 2.0, 1, True)[which % 4])
    if kind == "view":
        return op.view(op.t(op.t(a)), [-1, wide])
    if kind == "binary" and int(b.meta["val"].shape[-1]) == wide:
        return _BINARY[which % len(_BINARY)](a, b)
    return _UNARY[which % len(_UNARY)](a)
