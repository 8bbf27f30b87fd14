"""Which operations a decoding plan runs in C: each is matched here, or left to torch.

A match returns the step's kind, operands, sizes and numbers, or None where a layout or an option
is not served. Operands are nodes' values: places, constant tensors, or anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.linear_affine import SPEC as LINEAR_AFFINE
from ..kernels.plan_cpu import ACTIVATIONS, Kind, Pointwise, Strides, extent
from .decode_places import Place, heads_and_width, new_place, width_of

_ATEN = torch.ops.aten
_PLANISH = torch.ops.planish
_FEW = 8  # tokens up to which a dense matrix is read once for all of them

Shape = tuple[int | None, ...]


class Room(Protocol):
    """What a match may ask of the plan under construction."""

    few: bool
    rounded: bool

    def place(self, value: Any) -> Place | None:
        """The value's place, loaded into a buffer if torch computed it; None if it has none."""
        ...

    def buffer(self, shape: Shape) -> Place: ...

    def native(
        self,
        kind: Kind,
        inputs: Sequence[Place | Tensor | None],
        out: Place | None,
        size: Sequence[int],
        number: Sequence[float] = (),
    ) -> None: ...

    def compact(self, place: Place) -> Place | None:
        """The same value with its rows contiguous, copied if it must be."""
        ...


@dataclass(frozen=True)
class Site:
    """One call to be lowered: its arguments by name, and the shape of its result."""

    target: Any
    given: Mapping[str, Any]
    shape: Shape
    dtype: torch.dtype


Match = Callable[[Site, Room], "Place | None"]


def lower_native(site: Site, room: Room) -> Place | None:
    """Emit native steps for a call and return where its result lies; None if torch must run it."""
    match = _MATCHES.get(site.target)
    if match is None or site.dtype != torch.float32 or site.shape.count(None) != 1:
        return None
    return match(site, room)


def _vector(value: Any) -> bool:
    return value is None or (
        isinstance(value, Tensor)
        and value.dtype == torch.float32
        and value.dim() == 1
        and value.is_contiguous()
    )


def _strides(place: Place, width: int) -> tuple[int, Strides] | None:
    """(heads, strides) of a place as [tokens, heads, width]."""
    found = heads_and_width(place, width)
    return None if found is None else (found[0], Strides(place.token_stride, found[1]))


def _linear(site: Site, room: Room) -> Place | None:
    given = site.given
    x = room.place(given["x"])
    if x is None or not _vector(given["bias"]):
        return None
    if width_of(x.shape) != given["length"]:
        return None
    x = room.compact(x)
    if x is None:
        return None
    out = room.buffer(site.shape)
    codes = given["codes"]
    inputs = [x, codes, given["scale"], given["zero"], given["bias"]]
    sizes = [given["rows"], given["length"], given["group"], codes.stride(0), given["width"]]
    sizes.append(int(room.rounded))
    room.native(Kind.LINEAR, inputs, out, sizes)
    return out


def _dense(site: Site, room: Room) -> Place | None:
    given = site.given
    weight = given["weight"]
    usable = isinstance(weight, Tensor) and weight.dtype == torch.float32 and weight.dim() == 2
    if not room.few or not usable or not _vector(given.get("bias")):
        return None
    return _dense_product(site, room, given["input"], weight.contiguous(), given.get("bias"))


def _addmm(site: Site, room: Room) -> Place | None:
    given = site.given
    weight, bias = given["mat2"], given["self"]
    usable = isinstance(weight, Tensor) and weight.dtype == torch.float32 and _vector(bias)
    if not room.few or not usable or given["beta"] != 1 or given["alpha"] != 1:
        return None
    return _dense_product(site, room, given["mat1"], weight.t().contiguous(), bias)


def _dense_product(
    site: Site, room: Room, value: Any, weight: Tensor, bias: Tensor | None
) -> Place | None:
    x = room.place(value)
    rows, length = weight.shape
    if x is None or width_of(x.shape) != length:
        return None
    found = _strides(x, length)
    if found is None or found[0] != 1:
        return None
    out = room.buffer(site.shape)
    sizes = extent(1, rows, [found[1]], Strides(rows))
    room.native(Kind.DENSE, [x, weight, bias], out, [*sizes, rows, length])
    return out


def _norm(site: Site, room: Room, kind: Kind, value: Any, vectors: Sequence[Any],
          numbers: Sequence[float]) -> Place | None:  # fmt: skip
    x, width = room.place(value), site.shape[-1]
    if x is None or width is None or not all(map(_vector, vectors)):
        return None
    found = _strides(x, width)
    if found is None:
        return None
    out = room.buffer(site.shape)
    there = _strides(out, width)
    if there is None or there[0] != found[0]:
        return None
    sizes = extent(found[0], width, [found[1]], there[1])
    room.native(kind, [x, *vectors], out, sizes, numbers)
    return out


def _rms_norm(site: Site, room: Room) -> Place | None:
    given = site.given
    return _norm(
        site, room, Kind.RMS_NORM, given["x"], [given["weight"]], [given["eps"], given["offset"]]
    )


def _layer_norm(site: Site, room: Room) -> Place | None:
    given = site.given
    if len(given["normalized_shape"]) != 1:
        return None
    vectors = [given["weight"], given["bias"]]
    return _norm(site, room, Kind.LAYER_NORM, given["input"], vectors, [given["eps"]])


def _rotary(site: Site, room: Room) -> Place | None:
    given = site.given
    x, cos, sin = (room.place(given[name]) for name in ("x", "cos", "sin"))
    width = site.shape[-1]
    if x is None or cos is None or sin is None or width is None:
        return None
    half = cos.shape[-1]
    turned, across = _strides(x, width), _strides(cos, half or 0)
    down = _strides(sin, half or 0)
    # one angle for all heads: they lie on the axis that the tokens' axis is not
    if not turned or not across or not down or across[0] != 1 or down[0] != 1:
        return None
    if len(x.shape) - x.tokens_axis != len(cos.shape) - cos.tokens_axis:
        return None
    out = room.buffer(site.shape)
    there = _strides(out, width)
    if there is None or there[0] != turned[0]:
        return None
    angles = [Strides(cos.token_stride), Strides(sin.token_stride)]
    sizes = extent(turned[0], width, [turned[1], *angles], there[1])
    room.native(Kind.ROTARY, [x, cos, sin], out, [*sizes, half or 0, int(given["interleaved"])])
    return out


def _pointwise(
    site: Site, room: Room, kind: int, first: Any, second: Any = None, unary: bool = False
) -> Place | None:
    if isinstance(first, Tensor) or (not unary and isinstance(second, (Tensor, int, float))):
        return None
    a = room.place(first)
    b = None if unary else room.place(second)
    if a is None or a.shape != site.shape or (not unary and (b is None or b.shape != a.shape)):
        return None
    out = room.buffer(site.shape)
    operands = [place for place in (a, b, out) if place is not None]
    widths = [found[1] for place in operands if (found := place.rows()) is not None]
    if len(widths) != len(operands):
        return None
    width = min(widths)
    folded = [_strides(place, width) for place in operands]
    if any(fold is None or fold[0] * width != width_of(site.shape) for fold in folded):
        return None
    strides = [fold[1] for fold in folded if fold is not None]
    heads = width_of(site.shape) // width
    sizes = extent(heads, width, strides[:-1], strides[-1])
    room.native(Kind.POINTWISE, [a, b], out, [*sizes, kind])
    return out


def _activation(name: str) -> int:
    return Pointwise.FIRST_ACTIVATION + ACTIVATIONS.index(name)


def _gated(site: Site, room: Room) -> Place | None:
    given = site.given
    return _pointwise(site, room, _activation(given["activation"]), given["gate"], given["up"])


def _unary(name: str) -> Match:
    def match(site: Site, room: Room) -> Place | None:
        given = site.given
        chosen = "gelu_tanh" if given.get("approximate") == "tanh" else name
        value = given["self"] if "self" in given else given["x"]
        return _pointwise(site, room, _activation(chosen), value, unary=True)

    return match


def _binary(kind: Pointwise) -> Match:
    def match(site: Site, room: Room) -> Place | None:
        if site.given.get("alpha", 1) != 1:
            return None
        return _pointwise(site, room, kind, site.given["self"], site.given["other"])

    return match


_MATCHES: dict[Any, Match] = {
    getattr(_PLANISH, LINEAR_AFFINE.name).default: _linear,
    _ATEN.linear.default: _dense,
    _ATEN.addmm.default: _addmm,
    _PLANISH.rms_norm.default: _rms_norm,
    _ATEN.layer_norm.default: _layer_norm,
    _PLANISH.rotary.default: _rotary,
    _PLANISH.gated.default: _gated,
    _PLANISH.quick_gelu.default: _unary("quick_gelu"),
    _ATEN.silu.default: _unary("silu"),
    _ATEN.gelu.default: _unary("gelu"),
    _ATEN.relu.default: _unary("relu"),
    _ATEN.sigmoid.default: _unary("sigmoid"),
    _ATEN.add.Tensor: _binary(Pointwise.ADD),
    _ATEN.sub.Tensor: _binary(Pointwise.SUBTRACT),
    _ATEN.mul.Tensor: _binary(Pointwise.MULTIPLY),
}

__all__ = ["Room", "Site", "lower_native", "new_place"]
