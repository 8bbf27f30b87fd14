"""Run a program whole and its cached form in pieces: they must agree wherever a token stands."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..ir.edit import same_size
from ..ir.interpret import run
from ..ir.program import Node, Program
from .cache_inputs import LEAVE_OUT, CannotCache, Decoder

LIMIT = 1e-10
"""Allowed relative difference of the float64 runs."""


def check_cache(plain: Program, cached: Program, decoder: Decoder) -> None:
    """Run the examples whole and in three pieces, in float64; raise CannotCache if they differ.

    Places that the padding mask hides are not compared: what stands there nobody reads.
    """
    inputs = list(plain.examples)
    if not inputs:
        return
    token, axis = next(iter(decoder.tokens.items()))
    names = [node.name for node in plain.inputs]
    whole = inputs[names.index(token.name)].shape[axis]
    wanted = run(plain, inputs, float64=True)
    kept: list[Any] = list(cached.examples[len(inputs) :])
    cuts = sorted({0, whole // 2, whole - 1, whole})
    parts: list[list[Any]] = []
    for start, end in itertools.pairwise(cuts):
        pieces = [
            _piece(node, value, decoder, start, end)
            for node, value in zip(names, inputs, strict=True)
        ]
        found = run(cached, [*pieces, *kept], float64=True)
        parts.append(found[: len(wanted)])
        kept = found[len(wanted) :]
    seen = _seen(names, inputs, decoder)
    for place, result in enumerate(plain.results):
        if isinstance(result, Node):
            _compare(result, wanted[place], [part[place] for part in parts], decoder, seen)


def _piece(name: str, value: Any, decoder: Decoder, start: int, end: int) -> Any:
    for node, axis in decoder.tokens.items():
        if node.name == name:
            return value.narrow(axis, start, end - start)
    for node, axis in decoder.totals.items():
        if node.name == name and axis is not None:
            return value.narrow(axis, 0, end)
    return value


def _seen(names: list[str], inputs: list[Any], decoder: Decoder) -> Tensor | None:
    """bool[batch, length]: where a token stands; None where every place has one."""
    mask = decoder.mask
    value = inputs[names.index(mask.name)] if mask is not None else None
    if value is None or value.dim() != 2 or value.is_floating_point():
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
