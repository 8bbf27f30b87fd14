"""Export with free batch and length, and what is tried where a model does not allow that."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from .capture_failure import capture_failed


def export_free(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[ExportedProgram, list[str]]:
    """Non-strict first; strict, then fixed shapes, as fallbacks, each told in the notes.

    dynamic_shapes: as for `torch.export.export`; None for free ones. Raises CaptureFailed.
    """
    attempts = _attempts(args, kwargs, dynamic_shapes)
    first: BaseException | None = None
    notes: list[str] = []
    for note, strict, shapes, example in attempts:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exported = torch.export.export(
                    model,
                    example[0],
                    example[1],
                    dynamic_shapes=_per_argument(model, example, shapes),
                    strict=strict,
                )
        except Exception as error:  # any of torch.export's many failures leads to the next form
            first = first or error
            notes.append(f"{note}: {str(error).strip().splitlines()[0] if str(error) else error!r}")
        else:
            return exported, [*notes, f"captured {note}"]
    assert first is not None
    raise capture_failed(model, first) from first


def default_dynamic_shapes(args: tuple[Any, ...], kwargs: Mapping[str, Any], dim: Any) -> Any:
    """Free axes: batch and length of token-like inputs, batch of all others."""

    def free(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return None
        axes = 1 if value.is_floating_point() or value.dim() == 1 else 2
        return dict.fromkeys(range(axes), dim)

    shapes = pytree.tree_map(free, (args, dict(kwargs)))
    return {"args": shapes[0], "kwargs": shapes[1]}


def _attempts(
    args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> list[tuple[str, bool, Any, tuple[tuple[Any, ...], dict[str, Any]]]]:
    example = (args, kwargs)
    if dynamic_shapes is not None:
        return [
            ("with the given free axes", False, dynamic_shapes, example),
            ("with the given free axes, strict", True, dynamic_shapes, example),
        ]
    roomy = _widened(args, kwargs)
    free = default_dynamic_shapes(*roomy, Dim.DYNAMIC)
    batch = default_dynamic_shapes(*roomy, Dim.AUTO)
    return [
        ("with free batch and length", False, free, roomy),
        ("with free batch and length, strict", True, free, roomy),
        ("with the axes that could be kept free", False, batch, roomy),
    ]


def _widened(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat axes of size one: export takes size one for a constant.

    Axes are widened together in all inputs, so that batches and lengths still agree.
    """

    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        axes = 1 if value.is_floating_point() or value.dim() == 1 else 2
        for axis in range(axes):
            if value.shape[axis] == 1:
                value = value.repeat_interleave(2, axis)
        return value

    return pytree.tree_map(widen, (args, kwargs))


def _per_argument(
    model: torch.nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], shapes: Any
) -> Any:
    """torch.export wants one mapping, by parameter name; ours is split into args and kwargs."""
    if not (isinstance(shapes, dict) and set(shapes) == {"args", "kwargs"}):  # type: ignore[arg-type]
        return shapes
    names = list(inspect.signature(model.forward).parameters)
    positional = dict(zip(names, shapes["args"], strict=False))
    if len(positional) < len(example[0]):  # *args
        return tuple(shapes["args"])
    return {**positional, **shapes["kwargs"]}
