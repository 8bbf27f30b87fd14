"""A cached program on its examples, in pieces: what a lossy cache does to the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.history import Measured
from ..ir.interpret import run
from ..ir.numerics import sqnr
from ..ir.program import Program
from .cached_attention import PAST
from .insert_kv_cache import empty_past

_MASK = "attention_mask"


def example_text(program: Program) -> list[Any]:
    """The examples of the user's inputs; empty if there are none."""
    count = sum(not node.name.startswith(PAST) for node in program.inputs)
    return list(program.examples[:count])


def text_length(inputs: Sequence[Any]) -> int:
    """Tokens of a text [batch, length, ...] among flat inputs; 0 if there is none."""
    return next((v.shape[1] for v in inputs if isinstance(v, Tensor) and v.dim() >= 2), 0)


def run_in_pieces(
    program: Program, inputs: Sequence[Any], cuts: Sequence[int], *, float64: bool = False
) -> Tensor:
    """First result of a text that is given in pieces ending at `cuts`, joined along axis 1.

    inputs: the user's flat inputs for the text up to the last cut or longer.
    """
    names = [node.name for node in program.inputs]
    lead = next(v.shape[0] for v in inputs if isinstance(v, Tensor))
    past: list[Any] = empty_past(program, lead)
    found: list[Tensor] = []
    start = 0
    for end in cuts:
        piece = [_cut(name, v, start, end) for name, v in zip(names, inputs, strict=False)]
        results = run(program, [*piece, *past], float64=float64)
        found.append(results[0])
        past, start = results[len(results) - len(past) :], end
    return torch.cat(found, 1)


def _cut(name: str, value: Any, start: int, end: int) -> Any:
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    return value[:, :end] if name == _MASK else value[:, start:end]


def measured_loss(before: Program, after: Program, note: str) -> list[Measured]:
    """SQNR (dB) of the first result over the examples: half the text at once, then by the token.

    before, after: the programs with the exact and with the lossy cache. note: what to add to the
    length of the text.
    """
    inputs = example_text(before)
    length = text_length(inputs)
    if length < 2:
        return []
    cuts = [length // 2, *range(length // 2 + 1, length + 1)]
    exact = run_in_pieces(before, inputs, cuts, float64=True)
    found = sqnr(exact, run_in_pieces(after, inputs, cuts))
    own = sqnr(exact, run_in_pieces(before, inputs, cuts))
    return [Measured("SQNR of the first result (dB)", own, found, 0.0, f"{length} tokens{note}")]
