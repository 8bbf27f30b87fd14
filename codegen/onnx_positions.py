"""Rotary angles as tables: one row for every place that a text may have.

A cached decoder computes cosines and sines of the places `past .. past + length - 1` in every
call. Where they follow from the place alone the table of all places is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import Editor
from ..ir.positional import Positional, free_sizes
from ..ir.program import Node, Program

_CALLS = ((1, 0), (1, 1), (3, 0), (2, 5), (7, 4), (1, 23), (29, 0), (4, 31))
"""(length, past) of the calls at which a claim is tried; a program's longest is tried besides."""
_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Cosines of one angle may differ by that much: the vectorized form and its remainder loop."""


@dataclass(frozen=True)
class Lengths:
    """The symbols of a cached program: new tokens, tokens in the cache."""

    new: Any
    past: Any

    def sizes(self, program: Program, new: int, past: int) -> dict[Any, int]:
        return {**dict.fromkeys(free_sizes(program), 2), self.new: new, self.past: past}


class RotaryTables:
    """Tables [context, rotary / 2] of the angle values of one program, each proven once."""

    def __init__(self, program: Program, lengths: Lengths, context: int) -> None:
        self.program, self.lengths, self.context = program, lengths, context
        self._positional = Positional(program)
        self._found: dict[Node, Tensor | str] = {}
        self._stored: list[tuple[Tensor, Node]] = []

    @property
    def used(self) -> bool:
        """Whether a table is now a weight of the program."""
        return bool(self._stored)

    def weight(self, editor: Editor, name: str, table: Tensor) -> Node:
        """The table as a weight of the program, each stored once."""
        for known, node in self._stored:
            if torch.equal(known, table):
                return node
        self._stored.append((table, editor.weight(name, table)))
        return self._stored[-1][1]

    def table(self, angles: Node) -> Tensor | str:
        """The table behind a node [1, ..., 1, length, rotary / 2], or why there is none."""
        if angles not in self._found:
            self._found[angles] = self._prove(angles)
        return self._found[angles]

    def _prove(self, angles: Node) -> Tensor | str:
        value = angles.meta["val"]
        if value.dim() < 2 or value.dtype != torch.float32:
            return f"the angles %{angles.name} are not a float32 table"
        if not all(isinstance(n, int) and n == 1 for n in value.shape[:-2]):
            return f"the angles %{angles.name} differ between rows of the batch or heads"
        if angles not in self._positional.nodes:
            return f"the angles %{angles.name} depend on more than places"
        whole = self._rows(angles, self.context, 0)
        allowed = _ROUNDING * max(1.0, float(whole.abs().max()))
        for new, past in (*_CALLS, (1, self.context - 1)):
            if past + new > self.context:
                continue
            rows = self._rows(angles, new, past)
            expected = whole[past : past + new]
            if rows.shape != expected.shape:
                return f"the angles %{angles.name} are not one row a place"
            if not bool(((rows - expected).abs() <= allowed).all()):
                return f"the angles %{angles.name} of a place depend on the text's length too"
        return whole

    def _rows(self, angles: Node, new: int, past: int) -> Tensor:
        sizes = self.lengths.sizes(self.program, new, past)
        with torch.no_grad():
            found: Tensor = self._positional.evaluate(angles, sizes, {})
        return found.reshape(-1, found.shape[-1]).contiguous()
