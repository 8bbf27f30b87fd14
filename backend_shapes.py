"""Batch and length become free together, so that varying both costs one recompilation.

Dynamo frees only the sizes that it has seen to change: a new length first and a new batch later
are two recompilations. After the first (static) compilation we note in Dynamo's record of seen
sizes that batch and length have changed already; the next compilation then frees them all.
Size one stays a case of its own: torch always takes it for a constant.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch._dynamo import pgo


def free_axes(tensor: Tensor) -> range:
    """Batch and length of token-like inputs, batch of all others."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dim() < 2:
        return range(min(tensor.dim(), 1))
    return range(2)


def free_together(inputs: list[tuple[fx.Node, Tensor]]) -> None:
    """Let the next compilation of the frame that `inputs` belong to free batch and length.

    inputs: placeholders of Dynamo's graph that the user fills, with their example tensors. The
    frame is found by its record: the one that has seen all of these tensors in just these sizes.
    """
    names = {node.meta["grapharg"].source.name: tensor for node, tensor in inputs}
    if not names:
        return
    for state in pgo.get_code_state().values():
        seen = state.automatic_dynamic
        if all(name in seen and _has_sizes(seen[name], names[name]) for name in names):
            for name, tensor in names.items():
                _free(seen[name], tensor)


def _has_sizes(entry: Any, tensor: Tensor) -> bool:
    return isinstance(entry.size, tuple) and entry.size == tuple(tensor.shape)


def _free(entry: Any, tensor: Tensor) -> None:
    axes = free_axes(tensor)
    entry.size = tuple(
        pgo.auto_dynamic if axis in axes else size for axis, size in enumerate(entry.size)
    )
