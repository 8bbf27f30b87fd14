"""How much each layer and each branch turns the residual stream on calibration batches.

Block influence of Men et al. 2024 ("ShortGPT: Layers in Large Language Models are More Redundant
Than You Expect", eq. 1): 1 - E[x . y / (|x| |y|)] over tokens, x the stream before and y the
stream behind. Of a branch alone, y is the sum with it and x the sum without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.block_branches import Branch, Layer
from ..ir.interpret import run
from ..ir.program import Node, Program
from .calibrate import check_batches
from .contract import Context
from .nonfinite_activation import nonfinite_activation


def block_influence(
    program: Program, blocks: Sequence[Layer | Branch], context: Context
) -> list[float]:
    """The influence of each block: one run of the program for each batch, no values kept longer.

    Every position counts, padding too. Raises CalibrationTooSmall, NonFiniteActivation.
    """
    check_batches(program, context.calibration)
    sums, tokens = [0.0] * len(blocks), [0] * len(blocks)
    for number, batch in enumerate(context.calibration):
        context.progress(number, len(context.calibration), "block influence")
        _Measure(program, blocks, batch, number).add_to(sums, tokens)
    context.progress(len(context.calibration), len(context.calibration), "block influence")
    return [1.0 - total / max(count, 1) for total, count in zip(sums, tokens, strict=True)]


class _Measured(Exception):
    """Ends a watched run when all was seen: the head is not needed."""


class _Measure:
    """One run of one batch."""

    def __init__(
        self, program: Program, blocks: Sequence[Layer | Branch], batch: list[Any], number: int
    ) -> None:
        self.program, self.blocks, self.batch, self.number = program, blocks, batch, number
        self.ends: dict[Node, list[int]] = {}
        self.reads: dict[Node, int] = {}
        for place, block in enumerate(blocks):
            self.ends.setdefault(_end(block), []).append(place)
            for node in _needed(block):
                self.reads[node] = self.reads.get(node, 0) + 1
        self.held: dict[Node, Tensor] = {
            node: value
            for node, value in zip(program.inputs, batch, strict=True)
            if node in self.reads
        }

    def add_to(self, sums: list[float], tokens: list[int]) -> None:
        def watch(node: Node, value: Any) -> None:
            if node in self.reads:
                self.held[node] = value
            for place in self.ends.get(node, ()):
                cosine = self._cosine(self.blocks[place], value)
                if not bool(cosine.isfinite().all()):
                    raise nonfinite_activation(self.program, self.batch, self.number, node)
                sums[place] += float(cosine.sum())
                tokens[place] += cosine.numel()
            if node in left:
                left.remove(node)
                if not left:
                    raise _Measured

        left = set(self.ends)
        with contextlib.suppress(_Measured):
            run(self.program, self.batch, watch=watch)

    def _cosine(self, block: Layer | Branch, after: Tensor) -> Tensor:
        """The cosine of each token's vectors before and behind the block, float64."""
        behind = after.double()
        if isinstance(block, Layer):
            before = self._take(block.enters)
        else:
            before = behind - sum(self._take(term) for term in block.terms)
        product = (before * behind).sum(-1)
        norms = before.norm(dim=-1) * behind.norm(dim=-1)
        # where either is 0, a block that does nothing leaves both 0
        alone = (before.norm(dim=-1) == behind.norm(dim=-1)).double()
        return torch.where(norms == 0, alone, product / norms)

    def _take(self, node: Node) -> Tensor:
        if node.op == "get_attr":
            return self.program.weights[str(node.target)].double()
        value = self.held[node]
        self.reads[node] -= 1
        if self.reads[node] == 0:
            del self.held[node]
        return value.double()


def _end(block: Layer | Branch) -> Node:
    return block.leaves if isinstance(block, Layer) else block.total


def _needed(block: Layer | Branch) -> Sequence[Node]:
    return [block.enters] if isinstance(block, Layer) else block.terms


__all__ = ["block_influence"]
