"""How well a program that predicts tokens predicts its own input: cross entropy of the next ids.

The logits are the program's first result [batch, length, words] where some table with as many rows
is looked up by an integer input [batch, length]; that input shifted by one holds the labels.
Positions that a mask input (of the ids' shape, and itself no index of a table) marks 0 are left
out. Everything is found in the data flow; inputs go by no names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import cross_entropy

from ..ir.errors import PlanishError
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program

_ATEN = torch.ops.aten
_SAME = {
    _ATEN.view.default,
    _ATEN.reshape.default,
    _ATEN.clone.default,
    _ATEN.alias.default,
    _ATEN._to_copy.default,
    _ATEN.to.dtype,
}


class NoNextToken(PlanishError):
    """The program's results are no logits of next tokens, or its inputs no token ids."""


@dataclass(frozen=True)
class NextTokenLoss:
    """Where logits and labels are. logits: place among the results; ids, mask: of the inputs."""

    logits: int
    ids: int
    mask: int | None = None

    def __call__(self, flat_inputs: Sequence[Any], results: Sequence[Any]) -> Tensor:
        """The mean over positions, a scalar in at least float32. Raises NoNextToken."""
        logits, ids = results[self.logits], flat_inputs[self.ids]
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if logits.shape[:2] != ids.shape or ids.shape[1] < 2:
            raise _none(
                f"logits are {list(logits.shape)} and token ids {list(ids.shape)}",
                "logits of every position, and two tokens or more",
            )
        labels = ids[:, 1:].long()
        seen = None if self.mask is None else flat_inputs[self.mask] != 0
        if seen is not None and seen.shape == ids.shape:
            labels = labels.where(seen[:, :-1] & seen[:, 1:], -100)
        count = int((labels != -100).sum())
        total = cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
        return total / max(count, 1)


def next_token_loss(program: Program) -> NextTokenLoss:
    """Find logits, ids and mask; raises NoNextToken."""
    inputs = program.inputs
    looked_up = _looked_up(program)
    for place, result in enumerate(program.results):
        value = result.meta.get("val") if isinstance(result, fx.Node) else None
        if not isinstance(value, Tensor) or value.dim() != 3 or not value.is_floating_point():
            continue
        words = value.shape[-1]
        ids = [i for i, node in enumerate(inputs) if words in looked_up.get(node, ())]
        if ids:
            same = [i for i in ids if _sizes(inputs[i])[1] == _sizes(result)[1]]
            chosen = (same or ids)[-1]  # of an encoder and a decoder, the decoder
            return NextTokenLoss(place, chosen, _mask(inputs, chosen, looked_up))
    raise _none(
        "no result [batch, length, words] has as many words as a table that an input looks up",
        "a language model: token ids in, logits of every position out",
    )


def _looked_up(program: Program) -> dict[Node, set[int]]:
    """For each input of ids [batch, length] the rows of the tables that it is an index of."""
    found: dict[Node, set[int]] = {}
    for node in program.graph.nodes:
        if node.target is not _ATEN.embedding.default:
            continue
        given = bound_arguments(node)
        source: Any = given["indices"]
        while source.op == "call_function" and source.target in _SAME:
            source = source.args[0]
        if source.op == "placeholder" and len(_sizes(source)) == 2:
            found.setdefault(source, set()).add(given["weight"].meta["val"].shape[0])
    return found


def _mask(inputs: Sequence[Node], ids: int, looked_up: dict[Node, set[int]]) -> int | None:
    for place, node in enumerate(inputs):
        value = node.meta.get("val")
        if node in looked_up or not isinstance(value, Tensor) or value.is_floating_point():
            continue
        if len(_sizes(node)) == 2 and _sizes(node)[1] == _sizes(inputs[ids])[1]:
            return place
    return None


def _sizes(node: Node) -> list[str]:
    """A value's sizes as text: free ones compare without becoming fixed."""
    value = node.meta.get("val")
    return [str(size) for size in value.shape] if isinstance(value, Tensor) else []


def _none(found: str, expected: str) -> NoNextToken:
    return NoNextToken(
        "there is no next-token loss to take gradients of",
        expected=expected,
        found=found,
        fix="use importance=magnitude or importance=wanda, which need no loss",
    )


__all__ = ["NextTokenLoss", "NoNextToken", "next_token_loss"]
