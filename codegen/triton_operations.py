"""Pointwise and row operations in Triton, in float32 for every floating dtype.

A handler gets a `Call` and returns the expression of the result; lines that it needs before go to
`call.line`. Rounding to half precision happens where a graph casts and where results are stored,
not after every operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .triton_expressions import HALVES, Call, Unfusible

_ATEN = torch.ops.aten
_PLANISH = torch.ops.planish

Handler = Callable[[Call], str]


def _binary(sign: str, left: str = "self", right: str = "other") -> Handler:
    return lambda call: f"{call.at(left)} {sign} {call.at(right)}"


def _scaled_sum(sign: str) -> Handler:
    def made(call: Call) -> str:
        other, alpha = call.at("other"), call.given.get("alpha", 1)
        if alpha != 1:
            other = f"({other}) * {call.value(alpha, call.dtype)}"
        return f"{call.at('self')} {sign} ({other})"

    return made


def _compared(sign: str) -> Handler:
    def made(call: Call) -> str:
        dtype = call.common("self", "other")
        return f"{call.at('self', dtype)} {sign} {call.at('other', dtype)}"

    return made


def _called(function: str) -> Handler:
    return lambda call: f"{function}({call.at('self')})"


def _activated(name: str) -> Handler:
    return lambda call: f'activate({call.at("self")}, "{name}")'


def _gelu(call: Call) -> str:
    name = "gelu_tanh" if call.given["approximate"] == "tanh" else "gelu"
    return f'activate({call.at("self")}, "{name}")'


def _gated(call: Call) -> str:
    return f'activate({call.at("gate")}, "{call.given["activation"]}") * {call.at("up")}'


_POWERS = {2: "{x} * {x}", 3: "{x} * {x} * {x}", 0.5: "tl.sqrt({x})", -0.5: "tl.rsqrt({x})"}


def _pow(call: Call) -> str:
    exponent = call.given["exponent"]
    if isinstance(exponent, fx.Node) or exponent not in _POWERS:
        raise Unfusible(f"it raises to the power {exponent}")
    return _POWERS[exponent].format(x=call.at("self"))


def _div(call: Call) -> str:
    if call.given.get("rounding_mode") is not None or not call.dtype.is_floating_point:
        raise Unfusible("it divides with rounding")
    return f"{call.at('self')} / {call.at('other')}"


def _to_copy(call: Call) -> str:
    text = call.at("self")
    half = HALVES.get(call.node.meta["val"].dtype)
    return f"{text}.to({half}).to(tl.float32)" if half else text


def _where(call: Call) -> str:
    return f"tl.where({call.at('condition', torch.bool)}, {call.at('self')}, {call.at('other')})"


def _masked_fill(call: Call) -> str:
    return f"tl.where({call.at('mask', torch.bool)}, {call.at('value')}, {call.at('self')})"


def _clamp(call: Call) -> str:
    text = call.at("self")
    if call.given["min"] is not None:
        text = f"tl.maximum({text}, {call.at('min')})"
    if call.given["max"] is not None:
        text = f"tl.minimum({text}, {call.at('max')})"
    return text


def _extreme(function: str) -> Handler:
    return lambda call: f"{function}({call.at('self')}, {call.at('other')})"


def _logical(sign: str) -> Handler:
    return lambda call: f"{call.at('self', torch.bool)} {sign} {call.at('other', torch.bool)}"


def _bitwise(sign: str) -> Handler:
    return lambda call: f"{call.at('self')} {sign} {call.at('other')}"


def _negated(call: Call) -> str:
    if call.node.meta["val"].dtype != torch.bool:
        raise Unfusible("it inverts bits")
    return f"({call.at('self', torch.bool)} == 0)"


# ---- operations on whole rows


def _row_sum(call: Call, text: str) -> str:
    return f"tl.sum(tl.where(inside, {text}, 0.0), 1, keep_dims=True)"


def _along_rows(call: Call, argument: str = "dim") -> None:
    axes = call.given[argument]
    axes = axes if isinstance(axes, (list, tuple)) else [axes]
    value = call.given["self"].meta["val"]
    if not value.dtype.is_floating_point:
        raise Unfusible(f"it reduces {value.dtype}")
    if [axis % value.dim() for axis in axes] != [value.dim() - 1]:
        raise Unfusible("it reduces another axis than the last")
    if not call.given.get("keepdim", True):
        raise Unfusible("it drops the axis that it reduces")


def _sum(call: Call) -> str:
    _along_rows(call)
    return _row_sum(call, call.at("self"))


def _mean(call: Call) -> str:
    _along_rows(call)
    return f"{_row_sum(call, call.at('self'))} / {call.columns}"


def _amax(call: Call) -> str:
    _along_rows(call)
    return f'tl.max(tl.where(inside, {call.at("self")}, float("-inf")), 1, keep_dims=True)'


def _softmax(call: Call) -> str:
    _along_rows(call)
    text, name = call.at("self"), call.name
    call.line(f'{name}_in = tl.where(inside, {text}, float("-inf"))')
    call.line(f"{name}_top = tl.max({name}_in, 1, keep_dims=True)")
    call.line(f"{name}_exp = tl.exp({name}_in - {name}_top)")
    return f"{name}_exp / tl.sum({name}_exp, 1, keep_dims=True)"


def _rms_norm(call: Call) -> str:
    x, name, weight = call.at("x"), call.name, call.given["weight"]
    call.line(f"{name}_mean = {_row_sum(call, f'{x} * {x}')} / {call.columns}")
    normed = f"{x} * tl.rsqrt({name}_mean + {call.given['eps']!r})"
    if weight is None:
        return normed
    factor = call.at("weight")
    offset = call.given["offset"]
    return f"{normed} * ({factor} + {offset!r})" if offset else f"{normed} * {factor}"


def _layer_norm(call: Call) -> str:
    given, name = call.given, call.name
    if len(given["normalized_shape"]) != 1:
        raise Unfusible("it normalizes more than the last axis")
    x = call.at("input")
    call.line(f"{name}_mean = {_row_sum(call, x)} / {call.columns}")
    call.line(f"{name}_off = tl.where(inside, {x} - {name}_mean, 0.0)")
    call.line(f"{name}_var = tl.sum({name}_off * {name}_off, 1, keep_dims=True) / {call.columns}")
    text = f"{name}_off * tl.rsqrt({name}_var + {given['eps']!r})"
    text = text if given["weight"] is None else f"{text} * {call.at('weight')}"
    return text if given["bias"] is None else f"{text} + {call.at('bias')}"


POINTWISE: dict[Any, Handler] = {
    _ATEN.add.Tensor: _scaled_sum("+"),
    _ATEN.add.Scalar: _scaled_sum("+"),
    _ATEN.sub.Tensor: _scaled_sum("-"),
    _ATEN.sub.Scalar: _scaled_sum("-"),
    _ATEN.mul.Tensor: _binary("*"),
    _ATEN.mul.Scalar: _binary("*"),
    _ATEN.div.Tensor: _div,
    _ATEN.div.Scalar: _div,
    _ATEN.neg.default: lambda call: f"-({call.at('self')})",
    _ATEN.square.default: lambda call: f"{call.at('self')} * {call.at('self')}",
    _ATEN.reciprocal.default: lambda call: f"1.0 / {call.at('self')}",
    _ATEN.pow.Tensor_Scalar: _pow,
    _ATEN.exp.default: _called("tl.exp"),
    _ATEN.log.default: _called("tl.log"),
    _ATEN.sqrt.default: _called("tl.sqrt"),
    _ATEN.rsqrt.default: _called("tl.rsqrt"),
    _ATEN.abs.default: _called("tl.abs"),
    _ATEN.cos.default: _called("tl.cos"),
    _ATEN.sin.default: _called("tl.sin"),
    _ATEN.erf.default: _called("tl.erf"),
    _ATEN.tanh.default: _called("tanh"),
    _ATEN.sigmoid.default: _activated("sigmoid"),
    _ATEN.silu.default: _activated("silu"),
    _ATEN.relu.default: _activated("relu"),
    _ATEN.gelu.default: _gelu,
    _PLANISH.quick_gelu.default: lambda call: f'activate({call.at("x")}, "quick_gelu")',
    _PLANISH.gated.default: _gated,
    _ATEN._to_copy.default: _to_copy,
    _ATEN.where.self: _where,
    _ATEN.masked_fill.Scalar: _masked_fill,
    _ATEN.masked_fill.Tensor: _masked_fill,
    _ATEN.clamp.default: _clamp,
    _ATEN.maximum.default: _extreme("tl.maximum"),
    _ATEN.minimum.default: _extreme("tl.minimum"),
    _ATEN.eq.Tensor: _compared("=="),
    _ATEN.eq.Scalar: _compared("=="),
    _ATEN.ne.Tensor: _compared("!="),
    _ATEN.ne.Scalar: _compared("!="),
    _ATEN.lt.Tensor: _compared("<"),
    _ATEN.lt.Scalar: _compared("<"),
    _ATEN.le.Tensor: _compared("<="),
    _ATEN.le.Scalar: _compared("<="),
    _ATEN.gt.Tensor: _compared(">"),
    _ATEN.gt.Scalar: _compared(">"),
    _ATEN.ge.Tensor: _compared(">="),
    _ATEN.ge.Scalar: _compared(">="),
    _ATEN.logical_and.default: _logical("&"),
    _ATEN.logical_or.default: _logical("|"),
    _ATEN.logical_not.default: lambda call: f"({call.at('self', torch.bool)} == 0)",
    _ATEN.bitwise_and.Tensor: _bitwise("&"),
    _ATEN.bitwise_or.Tensor: _bitwise("|"),
    _ATEN.bitwise_not.default: _negated,
}
"""Operations on single values."""

ROW_WISE: dict[Any, Handler] = {
    _ATEN.sum.dim_IntList: _sum,
    _ATEN.mean.dim: _mean,
    _ATEN.amax.default: _amax,
    _ATEN._softmax.default: _softmax,
    _ATEN.softmax.int: _softmax,
    _PLANISH.rms_norm.default: _rms_norm,
    _ATEN.layer_norm.default: _layer_norm,
}
"""Operations that see a whole row at once."""

HANDLERS: dict[Any, Handler] = POINTWISE | ROW_WISE
