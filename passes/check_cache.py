"""Run a program whole and its cached form in pieces: they must agree wherever a token stands."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import same_size
from ..ir.interpret import run
from ..ir.program import Node, Program
from .cache_growing import PAST_LENGTH
from .cache_inputs import LEAVE_OUT, CannotCache, Decoder
from .cache_static import POSITION

LIMIT = 1e-10
"""Allowed relative difference of the float64 runs."""


def check_cache(plain: Program, cached: Program, decoder: Decoder) -> None:
    """Run the examples whole and in three pieces, in float64; raise CannotCache if they differ.

    Places that the padding mask hides are not compared: what stands there nobody reads.
    """
    if not plain.examples:
        return
    static = cached.metadata["cache"]["form"] == "static"
    room = cached.metadata["cache"]["context"] if static else None
    inputs = [
        _part(node, value, decoder, 0, room)
        for node, value in zip(plain.inputs, plain.examples, strict=True)
    ]
    wanted = run(plain, inputs, float64=True)
    parts = _in_pieces(cached, inputs, len(wanted), decoder, room)
    seen = _seen(plain, inputs, decoder)
    for place, result in enumerate(plain.results):
        if isinstance(result, Node):
            _compare(result, wanted[place], [part[place] for part in parts], decoder, seen)


def _in_pieces(
    cached: Program, inputs: list[Any], results: int, decoder: Decoder, room: int | None
) -> list[list[Any]]:
    nodes = cached.inputs[: len(inputs)]
    token, axis = next(iter(decoder.tokens.items()))
    whole = inputs[[node.name for node in nodes].index(token.name)].shape[axis]
    kept = list(cached.examples[len(inputs) :])
    parts: list[list[Any]] = []
    for start, end in itertools.pairwise(sorted({0, whole // 2, whole - 1, whole})):
        given = [_part(n, v, decoder, start, end) for n, v in zip(nodes, inputs, strict=True)]
        if room is not None:
            given = [fit_to_buffer(n, v, decoder, room) for n, v in zip(nodes, given, strict=True)]
        if cached.inputs[-1].name == PAST_LENGTH:
            kept = [*kept[: len(cached.inputs) - len(inputs) - 1], start]
        elif room is not None and cached.inputs[-1].name == POSITION:
            kept = [*kept[: len(cached.inputs) - len(inputs) - 1], torch.tensor(start)]
        found = run(cached, [*given, *kept], float64=True)
        parts.append(found[:results])
        kept = found[results:]
    return parts


def _part(node: Node, value: Any, decoder: Decoder, start: int, end: int | None) -> Any:
    """What of an input belongs to tokens start..end: those alone, or of a mask all before too."""
    for sources, begin in ((decoder.tokens, start), (decoder.totals, 0)):
        for source, axis in sources.items():
            if source.name == node.name and axis is not None:
                size = value.shape[axis]
                return value.narrow(axis, begin, (size if end is None else min(end, size)) - begin)
    return value


def fit_to_buffer(node: Node, value: Any, decoder: Decoder, room: int) -> Any:
    """An input for a buffer of `room` places: cut to them, and a mask filled up with ones."""
    if any(source.name == node.name for source in decoder.tokens):
        return _part(node, value, decoder, 0, room)
    for source, axis in decoder.totals.items():
        if source.name == node.name and axis is not None:
            cut = value.narrow(axis, 0, min(room, value.shape[axis]))
            more = list(cut.shape)
            more[axis] = room - cut.shape[axis]
            return torch.cat([cut, cut.new_ones(more)], axis)
    return value


def _seen(plain: Program, inputs: list[Any], decoder: Decoder) -> Tensor | None:
    """bool[batch, length]: where a token stands; None where every place has one."""
    mask = decoder.mask
    if mask is None:
        return None
    value = inputs[[node.name for node in plain.inputs].index(mask.name)]
    if value.dim() != 2 or value.is_floating_point():
        return None
    return value != 0


def _compare(
    result: Node, wanted: Any, parts: list[Any], decoder: Decoder, seen: Tensor | None
) -> None:
    if not isinstance(wanted, Tensor):
        return
    sizes = list(result.meta["val"].shape)
    axis = next((i for i, s in enumerate(sizes) if same_size(s, decoder.length)), None)
    found = parts[-1] if axis is None else torch.cat(parts, axis)
    if axis == 1 and seen is not None and seen.shape == wanted.shape[:2]:
        found, wanted = found[seen], wanted[seen]
    gap = (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300)
    if not gap <= LIMIT:
        raise CannotCache(
            "token by token the cached program does not compute what the whole text gives",
            where=result.meta.get("module", ""),
            expected="equal float64 runs on the example inputs",
            found=f"a relative difference of {float(gap):.2g} in %{result.name}",
            fix="something besides attention looks at other places: " + LEAVE_OUT,
        )
