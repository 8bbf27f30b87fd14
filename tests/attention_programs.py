"""Small programs of attention over free lengths, raised and checked, for the tests of raising."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from planish.ir.capture import capture_module
from planish.ir.history import PassRecord
from planish.ir.pattern import bound_arguments
from planish.ir.program import Program
from planish.passes.canonicalize import Canonicalize
from planish.passes.drop_dead import DropDead
from planish.passes.pipeline import Pipeline
from planish.passes.raise_attention import RaiseAttention
from torch import Tensor, nn
from torch.export import Dim

ATTENTION = torch.ops.planish.attention.default

Seen = tuple[bool, int, float, bool, str]
"""causal, window, softcap, sinks, mask: none, keys ([.., 1, keys]) or scores ([.., q, keys])."""

CAUSAL: Seen = (True, 0, 0.0, False, "none")


def raise_attention(
    program: Program, probes: list[list[Any]] | None = None
) -> tuple[Program, PassRecord]:
    steps = [Canonicalize(), DropDead(), RaiseAttention(), DropDead()]
    line = Pipeline(steps, verify="numbers" if probes else "structure", on_break="raise")
    after = line.run(program, probes=probes or [])
    return after, after.history.records[-2]


def seen(program: Program) -> list[Seen]:
    found: list[Seen] = []
    for node in program.graph.nodes:
        if node.target is ATTENTION:
            a = bound_arguments(node)
            kind = "none"
            if a["mask"] is not None:
                kind = "keys" if a["mask"].meta["val"].shape[-2] == 1 else "scores"
            found.append((a["causal"], a["window"], a["softcap"], a["sinks"] is not None, kind))
    return found


def squares(program: Program) -> list[str]:
    """Values whose last two axes are both the free length."""
    found: list[str] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        sizes = value.shape[-2:] if isinstance(value, Tensor) else ()
        if (
            len(sizes) == 2
            and isinstance(sizes[0], torch.SymInt)
            and str(sizes[0]) == str(sizes[1])
        ):
            found.append(f"{node.name}: {list(value.shape)}")
    return found


class Function(nn.Module):
    """A function of q, k, v [batch, heads, length, channels] as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor) -> Tensor:
        return self.function(q, k, v, pad)


BATCH, HEADS, QUERIES, KEYS, CHANNELS, VALUES = 2, 6, 7, 11, 10, 12


def inputs(queries: int = QUERIES, keys: int = KEYS, heads: int = HEADS) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(BATCH, HEADS, queries, CHANNELS, generator=generator)
    k = torch.randn(BATCH, heads, keys, CHANNELS, generator=generator)
    v = torch.randn(BATCH, heads, keys, VALUES, generator=generator)
    pad = torch.ones(BATCH, keys, dtype=torch.bool)
    pad[1, :3] = False
    return q, k, v, pad


def trace(function: Callable[..., Tensor], square: bool = False, heads: int = HEADS) -> Program:
    """Captured with free lengths; square: as many queries as keys."""
    args = inputs(KEYS if square else QUERIES, KEYS, heads)
    keys = Dim("keys", min=3)
    queries = keys if square else Dim("queries")
    shapes = ({2: queries}, {2: keys}, {2: keys}, {1: keys})
    return capture_module(Function(function), args, dynamic_shapes=shapes)


def raised(
    function: Callable[..., Tensor], square: bool = False, heads: int = HEADS
) -> tuple[Program, PassRecord]:
    """Raised and verified at two shapes."""
    program = trace(function, square, heads)
    other = inputs(9, 9, heads) if square else inputs(9, 5, heads)
    return raise_attention(program, [list(program.examples), list(other)])


def positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries [q, 1] and keys [1, k]; the last query sits at the last key."""
    last = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2])
    return last, torch.arange(k.shape[2])[None, :]
