"""Inputs and outputs of an ONNX graph: their names, dtypes and the names of their free axes."""

from __future__ import annotations

from typing import Any

import onnx_ir as oir
import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir.program import Node, Program
from .onnx_builder import INT64, Builder, Value, meta, onnx_dtype
from .onnx_call import read
from .onnx_decoder import Decoder, bind_lengths
from .onnx_sizes import bind_symbols, dimension_text, size

Names = dict[sympy.Symbol, str]


def graph_inputs(b: Builder, decoder: Decoder | None) -> list[Value]:
    """The program's tensors and sizes, then the lengths of a shared cache before the cache."""
    names = _symbol_names(b.program, decoder)
    shared = decoder is not None and decoder.shared
    mask = [bind_lengths(b, decoder)] if decoder is not None and shared else []
    found: list[Value] = []
    for node in b.program.inputs:
        if not isinstance(node.meta.get("val"), (Tensor, torch.SymInt)):
            continue
        if decoder is not None and node is decoder.past[0][0]:
            found += mask
        found.append(_input(b, node, names))
    return found


def _input(b: Builder, node: Node, names: Names) -> Value:
    """A graph input; every input fixes what it can of the symbols."""
    value, name = node.meta["val"], b.unique(b.names[node])
    if isinstance(value, torch.SymInt):
        found = Value(name=name, type=oir.TensorType(INT64), shape=oir.Shape([1]))
        b.memo.setdefault(("symbol", size(value)), (found, None))
        return found
    shape = [dimension_text(n, names) for n in value.shape]
    kind = oir.TensorType(onnx_dtype(value.dtype))
    found = Value(name=name, type=kind, shape=oir.Shape(shape))
    b.values[node] = found
    bind_symbols(b, found, value.shape)
    return found


def _symbol_names(program: Program, decoder: Decoder | None) -> Names:
    """batch, length, ... for the symbols of the capture, by the input axis they first stand for."""
    names: Names = {}
    if decoder is not None and isinstance(decoder.old, sympy.Symbol):
        names[decoder.old] = "past"
    for node in program.inputs:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            continue
        for axis, length in enumerate(value.shape):
            symbol = size(length)
            if isinstance(symbol, sympy.Symbol) and symbol not in names:
                names[symbol] = _axis_name(node.name, axis, set(names.values()))
    return names


def _axis_name(source: str, axis: int, taken: set[str]) -> str:
    short = ("batch", "length")[axis] if axis < 2 else f"axis{axis}"
    return f"{source}_{short}" if short in taken or axis > 1 else short


def graph_outputs(b: Builder, inputs: list[Value], decoder: Decoder | None) -> list[Value]:
    """The results under the names by which the model's output knows them."""
    symbols = _symbol_names(b.program, decoder)
    found: list[Value] = []
    used: set[Value] = set(inputs) | set(b.initializers.values())
    for name, result in zip(output_names(b.program, decoder), b.program.results, strict=True):
        if not isinstance(result, fx.Node) or not isinstance(result.meta["val"], Tensor):
            continue
        b.base, b.module = name, ""
        value = read(b, result)
        if value in used or value in b.initializers.values():
            value = b.op("Identity", value)
        used.add(value)
        value.name = b.unique(name)
        value.dtype = onnx_dtype(meta(result).dtype)
        shape = [dimension_text(n, symbols) for n in meta(result).shape]
        if decoder is not None and decoder.shared and name in decoder.outputs:
            shape[2] = "present"  # a buffer may be longer than what is in it
        value.shape = oir.Shape(shape)
        found.append(value)
    return found


def output_names(program: Program, decoder: Decoder | None = None) -> list[str]:
    """logits, hidden_states_0, ...: the path of each flat output in what the model returns."""
    spec = program.out_spec
    if decoder is not None:
        return [*_paths(spec.child(0)), *decoder.outputs]
    crossing = program.metadata.get("cross", {})
    if crossing.get("part") == "encoder":  # what the decoder's model takes, by its names there
        return [*_paths(spec.child(0)), *crossing["names"]]
    return _paths(spec)


def _paths(spec: pytree.TreeSpec) -> list[str]:
    count = spec.num_leaves
    tree = pytree.tree_unflatten(list(range(count)), spec)
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
