"""Activation functions and gates in ONNX."""

from __future__ import annotations

from .onnx_builder import BOOL, CONTRIB, FLOAT, Value
from .onnx_call import Call, Table


def _softplus(call: Call) -> Value:
    x, beta = call.value("self"), call["beta"]
    grown = x if beta == 1 else call.op("Mul", x, call.number(beta))
    soft = call.op("Softplus", grown)
    soft = soft if beta == 1 else call.op("Div", soft, call.number(beta))
    linear = call.op("Greater", grown, call.number(call["threshold"]), dtype=BOOL)
    return call.op("Where", linear, x, soft, dtype=call.dtype)


def activate(call: Call, x: Value, activation: str) -> Value:
    """The activation functions of gated MLPs (see planish::gated)."""
    match activation:
        case "silu" | "quick_gelu" if call.b.options.contrib and x.dtype == FLOAT:
            alpha = 1.0 if activation == "silu" else 1.702
            return call.op("QuickGelu", x, domain=CONTRIB, alpha=alpha)
        case "silu":
            return call.op("Mul", x, call.op("Sigmoid", x))
        case "gelu":
            return call.op("Gelu", x)
        case "gelu_tanh":
            return call.op("Gelu", x, approximate="tanh")
        case "quick_gelu":
            grown = call.op("Mul", x, call.b.constant(1.702, x.dtype))
            return call.op("Mul", x, call.op("Sigmoid", grown))
        case "relu":
            return call.op("Relu", x)
        case "sigmoid":
            return call.op("Sigmoid", x)
        case _:
            raise call.refuse(f"the activation {activation!r}")


def _gelu(call: Call) -> Value:
    kind = "gelu_tanh" if call["approximate"] == "tanh" else "gelu"
    return activate(call, call.value("self"), kind)


def _gated(call: Call) -> Value:
    up = call.value("up")
    return call.op("Mul", activate(call, call.value("gate"), call["activation"]), up)


def _leaky_relu(call: Call) -> Value:
    return call.op("LeakyRelu", call.value("self"), alpha=float(call["negative_slope"]))


def _elu(call: Call) -> Value:
    if call["scale"] != 1 or call["input_scale"] != 1:
        raise call.refuse("elu with scales")
    return call.op("Elu", call.value("self"), alpha=float(call["alpha"]))


TABLE: Table = {
    "aten.silu": lambda call: activate(call, call.value("self"), "silu"),
    "aten.gelu": _gelu,
    "aten.softplus": _softplus,
    "aten.leaky_relu": _leaky_relu,
    "aten.elu": _elu,
    "planish.quick_gelu": lambda call: activate(call, call.value("x"), "quick_gelu"),
    "planish.gated": _gated,
}
