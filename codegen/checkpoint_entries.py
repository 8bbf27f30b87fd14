"""The weights of a program under the names that its model's own class has for them.

Fused weights are taken apart again by rows, codes and all: a name such as `attn.q+k+v.weight`
tells what was put together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ir.encoded import Encoded
from ..ir.errors import UnsupportedByTarget
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.stack_encoded import slice_rows
from ..ir.weights import Derived, Entry
from .checkpoint_source import CheckpointModel


def checkpoint_entries(program: Program, model: CheckpointModel, target: str) -> dict[str, Entry]:
    """An entry for every name of the model, ties once unless the program untied them.

    Raises UnsupportedByTarget for a weight that the program lacks or that has another shape, and
    for one that it reads and the model has no place for.
    """
    weights = program.weights
    fused = _taken_apart(program, model)
    found: dict[str, Entry] = {}
    for name, shape in model.shapes.items():
        tied = model.ties.get(name)
        if name in weights and not (tied and weights.canonical(name) == _canonical(program, tied)):
            found[name] = weights.entry(name)
        elif name in fused:
            found[name] = fused[name]
        elif not tied and name not in weights:
            raise _unfit(target, f"the program has no weight {name}", "not there")
        if name in found and tuple(found[name].shape) != tuple(shape):
            raise _unfit(target, f"{name} is {list(shape)} in the model", list(found[name].shape))
    _refuse_strangers(program, model, {*found, *fused}, target)
    return found


def _canonical(program: Program, name: str) -> str | None:
    return program.weights.canonical(name) if name in program.weights else None


def _taken_apart(program: Program, model: CheckpointModel) -> dict[str, Entry]:
    """{name of the model: its rows of a fused weight}.

    A layer without a bias got zeros in a fused one; the model has no name for them.
    """
    found: dict[str, Entry] = {}
    for fused in program.weights:
        names = joined_names(fused)
        heights = [_rows_of(name, model) for name in names]
        start = 0
        for name, height in zip(names, heights, strict=True):
            if None not in heights and height is not None and name in model.shapes:
                found[name] = _rows(program.weights.entry(fused), start, start + height)
            start += height or 0
    return found


def _rows_of(name: str, model: CheckpointModel) -> int | None:
    """The rows of a weight or bias, from the layer's weight."""
    shape = model.shapes.get(f"{name.rpartition('.')[0]}.weight")
    return None if shape is None else shape[0]


def joined_names(fused: str) -> list[str]:
    """a.q+k+v.weight, or a.q+k+v.weight_2, means a.q.weight, a.k.weight and a.v.weight."""
    path, _, ending = fused.rpartition(".")
    prefix, dot, middle = path.rpartition(".")
    if "+" not in middle:
        return []
    return [f"{prefix}{dot}{part}.{ending.partition('_')[0]}" for part in middle.split("+")]


def rename(name: str, new: Mapping[str, str]) -> str:
    """A weight's new name; of a fused one, with the parts' new path."""
    if name in new:
        return new[name]
    for part in joined_names(name):
        if part in new:
            tokens = name.split(".")
            pairs = zip(part.split("."), new[part].split("."), strict=True)
            for place, (old, fresh) in enumerate(pairs):
                if old != fresh:
                    tokens[place] = fresh
            return ".".join(tokens)
    return name


def row_heights(node: Node) -> list[int]:
    """How many rows each part of a fused weight has, from the slices that readers take."""
    ends: list[tuple[int, int]] = []
    for user in node.users:
        for reader in user.users:
            if reader.target is torch.ops.aten.slice.Tensor:
                given = bound_arguments(reader)
                if isinstance(given["start"], int) and isinstance(given["end"], int):
                    ends.append((given["start"], given["end"]))
    return [end - start for start, end in sorted(ends)]


def _rows(entry: Entry, start: int, stop: int) -> Entry:
    if isinstance(entry, Encoded):
        return slice_rows(entry, start, stop)
    if isinstance(entry, Tensor):
        return entry[start:stop]
    shape = torch.Size((stop - start, *entry.shape[1:]))
    return Derived((entry,), lambda whole: whole[start:stop], shape, entry.dtype, "rows")


def _refuse_strangers(
    program: Program, model: CheckpointModel, written: set[str], target: str
) -> None:
    """A weight that the graph reads and no class of the model has would be lost silently."""
    buffers = {name for name, _ in model.module.named_buffers()}
    for node in program.weight_nodes():
        name = str(node.target)
        known = {name, *program.weights.names_of(name), *joined_names(name)}
        strange = node.users and not known & (written | buffers | set(model.ties))
        if strange and not _is_constant(program, name):
            raise _unfit(target, f"the program reads {name}", "a weight that a pass added")


def _is_constant(program: Program, name: str) -> bool:
    """What the model's code computes or writes out itself, so that no checkpoint holds it.

    The columns' order that `order_columns` moved to the inputs is none: the model would miss it.
    """
    if name.startswith("folded.") or "lifted_tensor" in name:
        return True
    return not program.weights.dtype(name).is_floating_point and not name.endswith(".order")


def _unfit(target: str, what: str, found: object) -> UnsupportedByTarget:
    return UnsupportedByTarget(
        f"target {target} cannot write this program as a checkpoint: {what}",
        expected="the weights that the model's own class has",
        found=str(found),
        fix="use a recipe that adds and drops no weights, for example raise and a quantizing pass",
    )


def linear_names(model: CheckpointModel, entries: Mapping[str, Entry]) -> list[str]:
    """The weights of matrix products, without tables and what is tied to one."""
    tables = {name for name in entries if isinstance(model.layer(name), nn.Embedding)}
    apart = tables | {other for other, name in model.ties.items() if name in tables}
    return [name for name in entries if name not in apart and model.layer(name) is not None]
