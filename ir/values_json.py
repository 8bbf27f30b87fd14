"""An argument of a graph's node as JSON and back, with its type kept: 1 and 1.0 stay apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .errors import CorruptFile, UnsupportedShape

_LAYOUTS = {
    "strided": torch.strided,
    "sparse_coo": torch.sparse_coo,
    "sparse_csr": torch.sparse_csr,
    "mkldnn": torch._mkldnn,  # type: ignore[reportPrivateUsage]
}
_MEMORY_FORMATS = {
    "contiguous_format": torch.contiguous_format,
    "preserve_format": torch.preserve_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}


def to_json(value: Any, where: str = "") -> Any:
    """The JSON form; raises UnsupportedShape for a value that no graph argument can be."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [to_json(part, where) for part in value]}
    if isinstance(value, (list, frozenset, set)):
        return [to_json(part, where) for part in value]
    if isinstance(value, dict):
        return {"dict": {str(key): to_json(part, where) for key, part in value.items()}}
    if isinstance(value, slice):
        return {"slice": [to_json(part, where) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [repr(value.real), repr(value.imag)]}
    for kind in (torch.dtype, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {kind.__name__: str(value).removeprefix("torch.").removeprefix("_")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise UnsupportedShape(
        f"a value of the type {type(value).__name__} cannot be saved",
        where=where,
        expected="numbers, text, lists, dtypes, devices or other values of the graph",
        found=repr(value)[:100],
        fix="make it a value of the graph",
    )


def from_json(form: Any, nodes: Mapping[str, fx.Node], where: str = "") -> Any:
    """The value of a form; `nodes` are the nodes it may refer to. Raises CorruptFile."""
    if form is None or isinstance(form, (bool, int, float, str)):
        return form
    if isinstance(form, list):
        return [from_json(part, nodes, where) for part in form]
    try:
        ((kind, value),) = form.items()
        return _typed(kind, value, nodes, where)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CorruptFile(
            "an argument of the saved graph cannot be read",
            where=where,
            expected='a value such as 1, "text", {"dtype": "float32"} or {"node": "earlier"}',
            found=repr(form)[:200],
            fix="save the program again",
        ) from error


def _typed(kind: str, value: Any, nodes: Mapping[str, fx.Node], where: str) -> Any:
    match kind:
        case "node":
            return nodes[value]
        case "float":
            return float(value)
        case "tuple":
            return tuple(from_json(part, nodes, where) for part in value)
        case "dict":
            return {key: from_json(part, nodes, where) for key, part in value.items()}
        case "slice":
            return slice(*(from_json(part, nodes, where) for part in value))
        case "complex":
            return complex(float(value[0]), float(value[1]))
        case "dtype":
            return dtype_of(value)
        case "layout":
            return _LAYOUTS[value]
        case "memory_format":
            return _MEMORY_FORMATS[value]
        case "device":
            return torch.device(value)
        case _:
            raise ValueError(kind)


def dtype_of(name: Any) -> torch.dtype:
    """float32, int64, ...; raises ValueError for another name."""
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"a dtype named {name!r}")
    return found
