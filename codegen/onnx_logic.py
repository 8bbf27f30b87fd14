"""Comparisons, logic and bits in ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .onnx_builder import BOOL, INT32, Value, onnx_dtype
from .onnx_call import Call, Table, Translation


def _test(op_type: str) -> Translation:
    """An op of one tensor with a boolean result."""

    def translate(call: Call) -> Value:
        return call.op(op_type, call.value("self"), dtype=BOOL)

    return translate


def _comparison(op_type: str, negate: bool = False) -> Translation:
    def translate(call: Call) -> Value:
        common = onnx_dtype(_common_dtype(call["self"], call["other"]))
        if common == BOOL and op_type != "Equal":
            common = INT32
        left, right = call.value("self", common), call.value("other", common)
        found = call.op(op_type, left, right, dtype=BOOL)
        return call.op("Not", found) if negate else found

    return translate


def _common_dtype(left: Any, right: Any) -> torch.dtype:
    values = [v.meta["val"] if isinstance(v, fx.Node) else v for v in (left, right)]
    return torch.result_type(*values)


def _bitwise(logical: str, bitwise: str) -> Translation:
    def translate(call: Call) -> Value:
        op_type = logical if call.dtype == BOOL else bitwise
        return call.op(op_type, call.value("self", call.dtype), call.value("other", call.dtype))

    return translate


def _logical(op_type: str) -> Translation:
    def translate(call: Call) -> Value:
        return call.op(op_type, call.value("self", BOOL), call.value("other", BOOL))

    return translate


def _not(call: Call) -> Value:
    return call.op("Not", call.value("self", BOOL))


def _bitwise_not(call: Call) -> Value:
    return call.op("Not" if call.dtype == BOOL else "BitwiseNot", call.value("self"))


_OPERATIONS: Table = {
    "eq": _comparison("Equal"),
    "ne": _comparison("Equal", negate=True),
    "lt": _comparison("Less"),
    "le": _comparison("LessOrEqual"),
    "gt": _comparison("Greater"),
    "ge": _comparison("GreaterOrEqual"),
    "logical_and": _logical("And"),
    "logical_or": _logical("Or"),
    "logical_xor": _logical("Xor"),
    "logical_not": _not,
    "bitwise_and": _bitwise("And", "BitwiseAnd"),
    "bitwise_or": _bitwise("Or", "BitwiseOr"),
    "bitwise_xor": _bitwise("Xor", "BitwiseXor"),
    "__and__": _bitwise("And", "BitwiseAnd"),
    "__or__": _bitwise("Or", "BitwiseOr"),
    "__xor__": _bitwise("Xor", "BitwiseXor"),
    "bitwise_not": _bitwise_not,
    "isnan": _test("IsNaN"),
    "isinf": _test("IsInf"),
}
TABLE: Table = {f"aten.{name}": translation for name, translation in _OPERATIONS.items()}
