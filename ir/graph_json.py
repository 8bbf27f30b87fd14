"""A program's graph as JSON and back: operators by name, arguments with their types.

A graph that is read is untrusted. Only pure operators of four namespaces and the functions that FX
itself uses for sizes are resolved; shapes and dtypes are computed again, never believed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .errors import CorruptFile, OperatorRefused
from .infer_values import Inference
from .pattern import SEMANTIC_OPS  # importing it registers the planish operators
from .program import Node
from .sizes_json import Sizes, size_to_json
from .values_json import from_json, to_json
from .weights import Weights

assert all(SEMANTIC_OPS)
NAMESPACES = ("aten", "planish", "prims")
_REFUSED = {"aten::from_file", "aten::_print"}  # they touch files or the terminal
_ARITHMETIC = ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "abs")
_LOGIC = ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in ("getitem", *_ARITHMETIC, *_LOGIC)},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{f"torch.{n}": getattr(torch, n) for n in ("sym_max", "sym_min", "sym_float", "sym_int")},
    **{f"torch.{n}": getattr(torch, n) for n in ("sym_not", "sym_ite", "sym_sum")},
}
_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}


def graph_to_json(graph: fx.Graph) -> dict[str, Any]:
    """Nodes in order, and the table of source lines they point into.

    Raises OperatorRefused for an operator that would not be loaded again.
    """
    sources: dict[str, int] = {}
    nodes: list[dict[str, Any]] = []
    for node in graph.nodes:
        form: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "call_function":
            form["target"] = target_name(node.target, f"%{node.name}")
        elif node.op == "get_attr":
            form["target"] = str(node.target)
        elif node.op == "placeholder":
            form["value"] = _input_to_json(node)
        if node.args and node.op != "placeholder":
            form["args"] = [to_json(argument, node.name) for argument in node.args]
        if node.kwargs:
            form["kwargs"] = {k: to_json(v, node.name) for k, v in node.kwargs.items()}
        if node.meta.get("module"):
            form["module"] = node.meta["module"]
        line = source_line(node)
        if line:
            form["source"] = sources.setdefault(line, len(sources))
        nodes.append(form)
    return {"nodes": nodes, "sources": list(sources)}


def source_line(node: Node) -> str:
    """The innermost line of the model's source, its file without the folder, or ""."""
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    for place in range(len(lines) - 1, -1, -1):
        if lines[place].lstrip().startswith("File "):
            head, _, rest = lines[place].strip().removeprefix('File "').partition('"')
            code = lines[place + 1].strip() if place + 1 < len(lines) else ""
            return f'File "{head.replace(chr(92), "/").rpartition("/")[2]}"{rest}\n    {code}'
    return ""


def target_name(target: Any, where: str = "") -> str:
    """namespace::operator.overload, or the name of an allowed function."""
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target._schema.name}.{target._overloadname}"
        resolve_target(name, where)
        return name
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise _refused(str(target), where)


def resolve_target(name: Any, where: str = "") -> Callable[..., Any]:
    """The operator of a name; raises OperatorRefused for any that is not known and pure."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    qualified, _, overload = str(name).rpartition(".")
    namespace, _, short = qualified.partition("::")
    if namespace not in NAMESPACES or qualified in _REFUSED or not short.isidentifier():
        raise _refused(str(name), where)
    packet = getattr(getattr(torch.ops, namespace), short, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket) or overload not in packet.overloads():
        raise _refused(str(name), where)
    target = getattr(packet, overload)
    if target._schema.is_mutable:
        raise _refused(f"{name}, which writes to memory", where)
    return target


def _refused(name: str, where: str) -> OperatorRefused:
    return OperatorRefused(
        f"a saved program cannot hold the operator {name}",
        where=where,
        expected=f"a pure operator of {', '.join(NAMESPACES)}, or a function of sizes",
        found=name,
        fix="remove the operator from the program, or update planish and torch",
    )


def _input_to_json(node: Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": [size_to_json(size, node.name) for size in value.shape],
            "device": str(value.device),
        }
    if isinstance(value, torch.SymInt):
        return {"size": size_to_json(value, node.name)}
    return {"constant": to_json(value, node.name)}


def graph_from_json(
    form: Mapping[str, Any], sizes: Sizes, weights: Weights, where: str
) -> fx.Graph:
    """Build the graph again, every value inferred. Raises CorruptFile, OperatorRefused."""
    graph = fx.Graph()
    values = Inference.of(FakeTensorMode(shape_env=sizes.env, allow_non_fake_inputs=True))
    sources = cast("list[str]", form["sources"])
    nodes: dict[str, Node] = {}
    for entry in form["nodes"]:
        name = str(entry.get("name")) if isinstance(entry, dict) else repr(entry)
        place = f"{where}: %{name}"
        try:
            node = _add_node(graph, entry, nodes, sizes, values, weights, place)
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
            raise CorruptFile(
                "a node of the saved program cannot be built",
                where=place,
                expected="a node as planish writes it, whose value can be computed",
                found=f"{type(error).__name__}: {str(error)[:300]}",
                fix="save the program again",
            ) from error
        if node.name != entry["name"] or entry["name"] in nodes:
            raise _corrupt(place, "a name of its own, fit for a graph", repr(entry["name"]))
        node.meta["module"] = str(entry.get("module", ""))
        if "source" in entry:
            node.meta["stack_trace"] = sources[int(entry["source"])]
        nodes[node.name] = node
    if not form["nodes"] or form["nodes"][-1]["op"] != "output":
        raise _corrupt(where, "an output as the last node", "none")
    return graph


def _add_node(
    graph: fx.Graph,
    entry: dict[str, Any],
    nodes: dict[str, Node],
    sizes: Sizes,
    values: Inference,
    weights: Weights,
    where: str,
) -> Node:
    name, kind = entry["name"], entry["op"]
    args = tuple(from_json(value, nodes, where) for value in entry.get("args", ()))
    kwargs = {k: from_json(v, nodes, where) for k, v in entry.get("kwargs", {}).items()}
    if kind == "placeholder":
        node = graph.create_node("placeholder", name, (), {}, name)
        node.meta["val"] = _input_value(entry["value"], sizes, values.mode, nodes, where)
    elif kind == "get_attr":
        if entry["target"] not in weights:
            raise ValueError(f"there is no weight {entry['target']!r}")
        node = graph.create_node("get_attr", weights.canonical(entry["target"]), (), {}, name)
        stored = weights.entry(entry["target"])
        node.meta["val"] = values.weight(torch.Size(stored.shape), stored.dtype)
    elif kind == "call_function":
        target = resolve_target(entry["target"], where)
        node = graph.create_node("call_function", target, args, kwargs, name)
        node.meta["val"] = values.call(node)
    elif kind == "output":
        node = graph.create_node("output", "output", args, {}, name)
    else:
        raise ValueError(f"a node of the kind {kind!r}")
    return node


def _input_value(
    form: dict[str, Any], sizes: Sizes, mode: FakeTensorMode, nodes: dict[str, Node], where: str
) -> Any:
    if "constant" in form:
        return from_json(form["constant"], nodes, where)
    if "size" in form:
        return sizes.size(form["size"])
    dtype = from_json({"dtype": form["dtype"]}, nodes, where)
    shape = [sizes.size(size) for size in form["shape"]]
    with mode:
        return torch.empty(shape, dtype=dtype, device=torch.device(form["device"]))


def _corrupt(where: str, expected: str, found: str) -> CorruptFile:
    return CorruptFile(
        "the saved graph is damaged",
        where=where,
        expected=expected,
        found=found,
        fix="save the program again",
    )
