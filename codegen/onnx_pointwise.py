"""ATen's and planish's elementwise operations in ONNX."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as oir

from .onnx_builder import BOOL, Value
from .onnx_call import Call, Table, Translation

_INT32 = oir.DataType.INT32


def _unary(op_type: str) -> Translation:
    """An op of one tensor, computed in the result's dtype."""

    def translate(call: Call) -> Value:
        (name,) = (n for n in ("self", "x", "input") if n in call.args)
        return call.op(op_type, call.value(name, call.dtype))

    return translate


def _binary(op_type: str, of_bool: str | None = None) -> Translation:
    """An op of two operands in the result's dtype; `of_bool` is its name for booleans."""

    def translate(call: Call) -> Value:
        chosen = of_bool if of_bool and call.dtype == BOOL else op_type
        return call.op(chosen, call.value("self", call.dtype), _other(call))

    return translate


def _other(call: Call) -> Value:
    return call.value("other", call.dtype)


def _scaled(op_type: str, of_bool: str | None = None) -> Translation:
    """add and sub: self (+|-) alpha * other."""

    def translate(call: Call) -> Value:
        left, right, alpha = call.value("self", call.dtype), _other(call), call.get("alpha", 1)
        if alpha != 1:
            right = call.op("Mul", right, call.number(alpha))
        return call.op(of_bool if of_bool and call.dtype == BOOL else op_type, left, right)

    return translate


def _rsub(call: Call) -> Value:
    left, alpha = call.value("self", call.dtype), call.get("alpha", 1)
    if alpha != 1:
        left = call.op("Mul", left, call.number(alpha))
    return call.op("Sub", _other(call), left)


def _div(call: Call) -> Value:
    mode = call.get("rounding_mode")
    left, right = call.value("self", call.dtype), _other(call)
    if mode is None or call.dtype.is_floating_point():
        quotient = call.op("Div", left, right)
        return quotient if mode is None else call.op(_ROUNDINGS[mode](call), quotient)
    if mode == "trunc":
        return call.op("Div", left, right)
    exact = call.op("Mod", left, right)  # the remainder with the sign of the divisor
    return call.op("Div", call.op("Sub", left, exact), right)


def _trunc_op(call: Call) -> str:
    raise call.refuse("a floating-point quotient rounded towards zero")


_ROUNDINGS = {"floor": lambda call: "Floor", "trunc": _trunc_op}


def _floor_divide(call: Call) -> Value:
    return _div(Call(call.b, call.node, {**call.args, "rounding_mode": "floor"}))


def _remainder(call: Call) -> Value:
    left, right = call.value("self", call.dtype), _other(call)
    if not call.dtype.is_floating_point():
        return call.op("Mod", left, right)
    floored = call.op("Floor", call.op("Div", left, right))
    return call.op("Sub", left, call.op("Mul", floored, right))


def _fmod(call: Call) -> Value:
    return call.op("Mod", call.value("self", call.dtype), _other(call), fmod=1)


def _pow(call: Call) -> Value:
    base, exponent = call["self"], call["exponent"]
    if exponent == 0.5:
        return call.op("Sqrt", call.value("self", call.dtype))
    return call.op("Pow", call.of(base, call.dtype), call.of(exponent, call.dtype))


def _rsqrt(call: Call) -> Value:
    return call.op("Reciprocal", call.op("Sqrt", call.value("self", call.dtype)))


def _square(call: Call) -> Value:
    value = call.value("self")
    return call.op("Mul", value, value)


def _log1p(call: Call) -> Value:
    return call.op("Log", call.op("Add", call.value("self", call.dtype), call.number(1)))


def _expm1(call: Call) -> Value:
    return call.op("Sub", call.op("Exp", call.value("self", call.dtype)), call.number(1))


def _where(call: Call) -> Value:
    left, right = call.value("self", call.dtype), call.value("other", call.dtype)
    return call.op("Where", call.value("condition", BOOL), left, right, dtype=call.dtype)


def _masked_fill(call: Call) -> Value:
    filled = call.value("value", call.dtype)
    mask = call.value("mask", BOOL)
    return call.op("Where", mask, filled, call.value("self", call.dtype), dtype=call.dtype)


def _clamp(call: Call) -> Value:
    x = call.value("self", call.dtype)
    low, high = call.optional("min", call.dtype), call.optional("max", call.dtype)
    if low is not None:
        x = call.op("Max", x, low)
    return x if high is None else call.op("Min", x, high)


def _nan_to_num(call: Call) -> Value:
    info = np.finfo(call.dtype.numpy())
    fills = (
        (math.inf, call.get("posinf", float(info.max))),
        (-math.inf, call.get("neginf", float(info.min))),
    )
    x = call.value("self")
    found = call.op("IsNaN", x, dtype=BOOL)
    out = call.op("Where", found, call.number(call.get("nan", 0.0)), x, dtype=call.dtype)
    for end, fill in fills:
        at_end = call.op("Equal", x, call.number(end), dtype=BOOL)
        out = call.op("Where", at_end, call.number(fill), out, dtype=call.dtype)
    return out


def _to_copy(call: Call) -> Value:
    return call.value("self", call.dtype)


_UNARY = {
    **{name: name.capitalize() for name in ("neg", "abs", "exp", "log", "sqrt", "sin", "cos")},
    **{name: name.capitalize() for name in ("tan", "tanh", "sigmoid", "relu", "erf", "floor")},
    **{name: name.capitalize() for name in ("ceil", "round", "sign", "reciprocal", "sinh")},
    **{name: name.capitalize() for name in ("cosh", "asin", "acos", "atan", "mish")},
}
_ARITHMETIC: Table = {
    "add": _scaled("Add", of_bool="Or"),
    "sub": _scaled("Sub"),
    "rsub": _rsub,
    "mul": _binary("Mul", of_bool="And"),
    "div": _div,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "fmod": _fmod,
    "maximum": _binary("Max", of_bool="Or"),
    "minimum": _binary("Min", of_bool="And"),
    "max.other": _binary("Max", of_bool="Or"),
    "min.other": _binary("Min", of_bool="And"),
    "pow": _pow,
}
_OTHERS: Table = {
    "rsqrt": _rsqrt,
    "square": _square,
    "log1p": _log1p,
    "expm1": _expm1,
    "where": _where,
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp,
    "nan_to_num": _nan_to_num,
    "_to_copy": _to_copy,
    "to": _to_copy,
    "type_as": _to_copy,
}
_NO_OPS = ("clone", "alias", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", "dropout")

_ATEN: Table = {
    **{name: _unary(op_type) for name, op_type in _UNARY.items()},
    **_ARITHMETIC,
    **_OTHERS,
}
TABLE: Table = {
    **{f"aten.{name}": translation for name, translation in _ATEN.items()},
    **{f"aten.{name}": lambda call: call.value(next(iter(call.args))) for name in _NO_OPS},
}
