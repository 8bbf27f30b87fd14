"""Where the values of a decoding plan lie: rows of floats, one for each token.

A place is a view of a buffer [tokens, width]. Its axes have fixed sizes but for one, the tokens,
and fixed strides, so that an address serves every number of tokens. Which operations only look at
a place in another way is found by running them on tensors without data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import map_aggregate

_PROBES = (7, 11)  # two numbers of tokens: what differs between them depends on it
_META = torch.device("meta")


@dataclass(frozen=True)
class Place:
    """A float32 value of `shape` (None: the tokens) at `offset` of each row of a buffer."""

    buffer: int
    offset: int
    shape: tuple[int | None, ...]
    strides: tuple[int, ...]

    @property
    def tokens_axis(self) -> int:
        return self.shape.index(None)

    @property
    def token_stride(self) -> int:
        return self.strides[self.tokens_axis]

    def sizes(self, tokens: int) -> list[int]:
        return [tokens if size is None else size for size in self.shape]

    def rows(self) -> tuple[int, int, int] | None:
        """(heads, width, head stride) of the value as [tokens, heads, width]; width contiguous.

        None where the other axes do not fold into these two.
        """
        axes = [
            (size, stride)
            for size, stride in zip(self.shape, self.strides, strict=True)
            if size is not None and size != 1
        ]
        width = 1
        while axes and axes[-1][1] == width:
            width *= axes.pop()[0]
        heads, head_stride = 1, 0
        for size, stride in reversed(axes):
            if heads > 1 and stride != heads * head_stride:
                return None
            head_stride = head_stride if heads > 1 else stride
            heads *= size
        return heads, width, head_stride


def new_place(buffer: int, shape: Sequence[int | None]) -> Place:
    """A place that fills its buffer: the tokens outermost, the other axes contiguous."""
    strides, size = [0] * len(shape), 1
    for axis in reversed(range(len(shape))):
        known = shape[axis]
        if known is not None:
            strides[axis] = size
            size *= known
    strides[list(shape).index(None)] = size
    return Place(buffer, 0, tuple(shape), tuple(strides))


def width_of(shape: Sequence[int | None]) -> int:
    """Floats a token."""
    return prod(size for size in shape if size is not None)


def heads_and_width(place: Place, width: int) -> tuple[int, int] | None:
    """(heads, head stride) of the value as [tokens, heads, width] for a given last axis."""
    found = place.rows()
    if found is None:
        return None
    heads, whole, stride = found
    if whole == width:
        return heads, stride
    if heads == 1 and whole % width == 0:
        return whole // width, width
    return None


def viewed(
    target: Callable[..., Any], args: Any, kwargs: Any, sizes: Callable[[Any, int], Any]
) -> Place | list[Place] | None:
    """The result of an operation whose one place is only looked at in another way, or None.

    sizes: replaces what depends on the number of tokens by its value for that number.
    """
    places: list[Place] = []
    map_aggregate((args, kwargs), lambda a: places.append(a) if isinstance(a, Place) else None)
    if len(places) != 1:
        return None
    source = places[0]
    found = [_probe(target, args, kwargs, source, sizes, tokens) for tokens in _PROBES]
    first, second = found
    if first is None or second is None or len(first) != len(second):
        return None
    made = [_same(a, b, source.buffer) for a, b in zip(first, second, strict=True)]
    if any(place is None for place in made):
        return None
    several = [place for place in made if place is not None]
    return several if _returns_list(target) else several[0]


def _returns_list(target: Any) -> bool:
    return "[]" in str(target._schema.returns[0].type) or "List" in str(
        target._schema.returns[0].type
    )


def _probe(
    target: Callable[..., Any],
    args: Any,
    kwargs: Any,
    source: Place,
    sizes: Callable[[Any, int], Any],
    tokens: int,
) -> list[Tensor] | None:
    length = source.offset + 1 + sum(
        (size - 1) * stride for size, stride in zip(source.sizes(tokens), source.strides,
                                                    strict=True)
    )  # fmt: skip
    storage = torch.empty(length, device=_META)
    value = torch.as_strided(storage, source.sizes(tokens), source.strides, source.offset)

    def filled(argument: Any) -> Any:
        return value if isinstance(argument, Place) else sizes(argument, tokens)

    result = target(*map_aggregate(args, filled), **map_aggregate(kwargs, filled))
    results = list(result) if isinstance(result, (list, tuple)) else [result]
    shared = storage.untyped_storage()._cdata
    if any(r.untyped_storage()._cdata != shared for r in results):
        return None
    return results


def _same(a: Tensor, b: Tensor, buffer: int) -> Place | None:
    """The place of a value probed with two numbers of tokens, if only its tokens' axis differs."""
    differs = [axis for axis in range(a.dim()) if a.shape[axis] != b.shape[axis]]
    counted = [axis for axis in differs if (a.shape[axis], b.shape[axis]) == _PROBES]
    if len(differs) != 1 or counted != differs or a.storage_offset() != b.storage_offset():
        return None
    fixed = [axis for axis in range(a.dim()) if a.shape[axis] != 1]
    if any(a.stride(axis) != b.stride(axis) for axis in fixed):
        return None
    if any(a.stride(axis) == 0 for axis in fixed):  # expanded: rows would be read, never written
        return None
    shape = tuple(None if axis == differs[0] else size for axis, size in enumerate(a.shape))
    return Place(buffer, int(a.storage_offset()), shape, tuple(a.stride()))
