"""How much each expert of a routed layer gives: on calibration batches, or by its weights.

With batches: the sum over tokens of |g f(x)|, the norm of what the expert f adds with its routing
weight g; tokens that are not routed to it count 0. So an expert counts by how often it is chosen,
with what probability, and by the size of what it gives (Lasby et al. 2025, "REAP the Experts", take
the mean over the tokens that are routed to it; the sum also sees how many there are).
Without: the norm of all its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import same_size
from ..ir.expert_axes import sizes
from ..ir.expert_layers import ExpertLayer
from ..ir.interpret import run
from ..ir.program import Node, Program
from .calibrate import check_batches
from .contract import Context
from .nonfinite_activation import nonfinite_activation


def expert_importance(
    program: Program, layers: Sequence[ExpertLayer], context: Context
) -> list[Tensor]:
    """float64[experts] of each layer. Raises CalibrationTooSmall, NonFiniteActivation."""
    given = [_given(layer) for layer in layers]
    if not context.calibration:
        return [_magnitude(program, layer) for layer in layers]
    check_batches(program, context.calibration)
    found = [torch.zeros(layer.experts, dtype=torch.float64) for layer in layers]
    for number, batch in enumerate(context.calibration):
        context.progress(number, len(context.calibration), "importance of experts")
        _measure(program, layers, given, found, batch, number)
    context.progress(len(context.calibration), len(context.calibration), "importance of experts")
    return [
        _magnitude(program, layer) if value is None else score
        for layer, value, score in zip(layers, given, found, strict=True)
    ]


def _magnitude(program: Program, layer: ExpertLayer) -> Tensor:
    total = torch.zeros(layer.experts, dtype=torch.float64)
    for name in layer.stacks:
        stack = program.weights[name]
        for expert in range(layer.experts):
            total[expert] += stack[expert].double().square().sum()
    return total.sqrt()


def _measure(
    program: Program,
    layers: Sequence[ExpertLayer],
    given: Sequence[Node | None],
    found: Sequence[Tensor],
    batch: list[Any],
    number: int,
) -> None:
    numbers = {layer.numbers for layer in layers}
    places = {value: place for place, value in enumerate(given) if value is not None}
    held: dict[Node, Tensor] = {}

    def watch(node: Node, value: Any) -> None:
        if node in numbers:
            held[node] = value
        if node in places:
            place = places[node]
            norms = value.double().norm(dim=-1).flatten()
            if not bool(norms.isfinite().all()):
                raise nonfinite_activation(program, batch, number, node)
            chosen = held.pop(layers[place].numbers).flatten()
            found[place].index_add_(0, chosen, norms)

    run(program, batch, watch=watch)


def _given(layer: ExpertLayer) -> Node | None:
    """What the chosen experts give, [..chosen, channels]; None if that is not one value.

    It is the last of the values that have a row for each chosen number.
    """
    lead = sizes(layer.numbers)
    waiting = [user for user in layer.numbers.users if _rows(user, lead)]
    seen = set(waiting)
    last: list[Node] = []
    while waiting:
        node = waiting.pop()
        after = [user for user in node.users if _rows(user, lead)]
        if not after:
            last.append(node)
        fresh = [user for user in after if user not in seen]
        seen.update(fresh)
        waiting.extend(fresh)
    alone = len(last) == 1 and len(sizes(last[0])) == len(lead) + 1
    return last[0] if alone else None


def _rows(node: Node, lead: Sequence[Any]) -> bool:
    own = sizes(node)
    return len(own) > len(lead) and all(
        same_size(a, b) for a, b in zip(own[: len(lead)], lead, strict=True)
    )


__all__ = ["expert_importance"]
