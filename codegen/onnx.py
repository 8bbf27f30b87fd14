"""The ONNX target: a program becomes `model.onnx` with its weights in `model.onnx.data`.

Every operation is translated by our own tables (`onnx_table`), so the ONNX graph is the program's
graph: an operation a node or a few, under the program's names, with the source module in the
node's metadata. Weights stay as they are kept: dense, or packed integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as oir
import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..ir.errors import WrongOption
from ..ir.program import Node, Program
from ..ir.text import value_names
from .onnx_builder import CONTRIB, INT64, Builder, Options, Value, meta, onnx_dtype
from .onnx_call import read
from .onnx_sizes import bind_symbols, dimension_text, size
from .onnx_translate import translate_program
from .target import Target

MODEL = "model.onnx"
WEIGHTS = "model.onnx.data"
OPSET = 23
IR_VERSION = 11


def export(
    program: Program,
    folder: Path,
    profile: str,
    metadata: Mapping[str, Any],
    *,
    activations: str = "float",
) -> None:
    """Write `model.onnx` and `model.onnx.data` into an existing folder.

    profile: "ort" may use onnxruntime's own operators, "standard" only those of ONNX. activations:
    "float" computes what the program computes; "int8" lets onnxruntime round the activations of
    packed linears to 8 bits, which is faster and a loss on top of the weights' own. metadata: told
    in the model's properties. Raises UnsupportedByTarget, WrongOption.
    """
    if activations == "int8" and profile != "ort":
        raise WrongOption(
            "only profile ort has products of 8 bit activations",
            expected='activations="float", or profile="ort"',
            found=f'activations="int8" with profile={profile!r}',
            fix="leave activations out",
        )
    model = build(program, Options(profile, activations), metadata)
    oir.save(model, folder / MODEL, external_data=WEIGHTS)


def build(program: Program, options: Options, metadata: Mapping[str, Any]) -> oir.Model:
    """The model in memory; its weights are read only when it is saved."""
    b = Builder(program, options, value_names(program.graph))
    inputs = [_input(b, node) for node in program.inputs if _is_tensor(node)]
    translate_program(b, program.results)
    symbols = _symbol_names(program)
    outputs = _outputs(b, inputs, symbols)
    graph = oir.Graph(
        inputs,
        outputs,
        nodes=b.nodes,
        initializers=list(b.initializers.values()),
        opset_imports=_opsets(b),
        name=str(program.metadata.get("source", "program")),
    )
    properties = _properties(b, metadata)
    return oir.Model(
        graph, ir_version=IR_VERSION, producer_name="planish", metadata_props=properties
    )


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.Tensor, torch.SymInt))


def _input(b: Builder, node: Node) -> Value:
    """A graph input; every input fixes what it can of the symbols."""
    value, name = node.meta["val"], b.unique(b.names[node])
    if isinstance(value, torch.SymInt):
        found = Value(name=name, type=oir.TensorType(INT64), shape=oir.Shape([1]))
        b.memo.setdefault(("symbol", size(value)), (found, None))
        return found
    shape = [dimension_text(n, _symbol_names(b.program)) for n in value.shape]
    kind = oir.TensorType(onnx_dtype(value.dtype))
    found = Value(name=name, type=kind, shape=oir.Shape(shape))
    b.values[node] = found
    bind_symbols(b, found, value.shape)
    return found


def _symbol_names(program: Program) -> dict[sympy.Symbol, str]:
    """batch, length, ... for the symbols of the capture, by the input axis they first stand for."""
    names: dict[sympy.Symbol, str] = {}
    for node in program.inputs:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue
        for axis, length in enumerate(value.shape):
            symbol = size(length)
            if isinstance(symbol, sympy.Symbol) and symbol not in names:
                names[symbol] = _axis_name(node.name, axis, set(names.values()))
    return names


def _axis_name(source: str, axis: int, taken: set[str]) -> str:
    short = ("batch", "length")[axis] if axis < 2 else f"axis{axis}"
    return f"{source}_{short}" if short in taken or axis > 1 else short


def _outputs(b: Builder, inputs: list[Value], symbols: dict[sympy.Symbol, str]) -> list[Value]:
    """The results under the names by which the model's output knows them."""
    found: list[Value] = []
    used: set[Value] = set(inputs) | set(b.initializers.values())
    for name, result in zip(output_names(b.program), b.program.results, strict=True):
        if not isinstance(result, fx.Node) or not isinstance(result.meta["val"], torch.Tensor):
            continue
        b.base, b.module = name, ""
        value = read(b, result)
        if value in used or value in b.initializers.values():
            value = b.op("Identity", value)
        used.add(value)
        value.name = b.unique(name)
        value.dtype = onnx_dtype(meta(result).dtype)
        value.shape = oir.Shape([dimension_text(n, symbols) for n in meta(result).shape])
        found.append(value)
    return found


def output_names(program: Program) -> list[str]:
    """logits, past_key_values_0, ...: the path of each flat output in what the model returns."""
    count = len(program.results)
    tree = pytree.tree_unflatten(list(range(count)), program.out_spec)
    paths, _ = pytree.tree_flatten_with_path(tree)
    names = ["_".join(_key_text(key) for key in path) for path, _ in paths]
    lone = "output" if count == 1 else ""
    return [name or lone or f"output_{place}" for place, name in enumerate(names)]


def _key_text(key: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            found = getattr(key, attribute)
            return f"output_{found}" if isinstance(found, int) else str(found)
    return str(key)


def _opsets(b: Builder) -> dict[str, int]:
    opsets = {"": OPSET}
    if any(node.domain == CONTRIB for node in b.nodes):
        opsets[CONTRIB] = 1
    return opsets


def _properties(b: Builder, metadata: Mapping[str, Any]) -> dict[str, str]:
    from .bundle import planish_version

    told: dict[str, Any] = {
        **metadata,
        "version": planish_version(),
        "profile": b.options.profile,
        "activations": b.options.activations,
        "history": b.program.history.to_json(),
    }
    if b.notes:
        told["notes"] = b.notes
    return {
        f"planish.{key}": value if isinstance(value, str) else json.dumps(value, default=str)
        for key, value in told.items()
    }


TARGET = Target(
    name="onnx",
    export=export,
    profiles=("ort", "standard"),
    doc="model.onnx for onnxruntime (profile ort) or for any ONNX runtime (profile standard)",
    options={"activations": ("float", "int8")},
)
