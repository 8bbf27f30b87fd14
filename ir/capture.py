"""Capture: a model becomes a Program.

`torch.export` without decompositions, then functionalized as by an empty decomposition table: the
form in which `linear`, `layer_norm` and `scaled_dot_product_attention` are still whole and no
operation writes to memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    InputKind,
    OutputKind,
)
from torch.utils import _pytree as pytree

from .errors import CaptureFailed, StatefulModel, WrongInput
from .export_free import export_free
from .functional_form import functional_form
from .named_arguments import named_arguments
from .own_cache import without_own_cache
from .program import Program
from .weights import Entry, Weights, find_ties

_WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_RESULT_KINDS = (OutputKind.USER_OUTPUT,)


def capture_module(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Program:
    """Export a module in inference form and make it a Program.

    args, kwargs: example inputs. dynamic_shapes: as for `torch.export.export`; by default the
    first two axes of every integer or boolean input and the first axis of every other tensor
    are free. A model that keeps a KV cache itself is captured without. Raises
    CaptureFailed (naming the source line) and StatefulModel.
    """
    kwargs = dict(kwargs or {})
    _check_examples(args, kwargs)
    was_training = model.training
    model.eval()
    try:
        # shapes that somebody gave go by the names that the model has
        named = named_arguments(model, args, kwargs) if dynamic_shapes is None else nullcontext()
        with without_own_cache(model) as had_cache, named:
            exported, notes = export_free(model, args, kwargs, dynamic_shapes)
    finally:
        model.train(was_training)
    program = capture_exported(exported)
    program.examples = tuple(pytree.tree_leaves((args, kwargs)))
    if had_cache:
        notes.append("captured with config.use_cache off: the program returns no cache")
    program.metadata["source"] = type(model).__qualname__
    program.metadata["notes"] = notes
    return program


def capture_exported(exported: ExportedProgram) -> Program:
    """Make a Program of an ExportedProgram; raises StatefulModel if it writes to buffers."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = functional_form(exported)
        if functional is None:
            exported = exported.run_decompositions({})
    _refuse_state(exported)
    entries = _weight_entries(exported)
    graph = _lift_weights(exported, functional or exported.graph, entries.aliases)
    call = exported.call_spec
    assert call.in_spec is not None and call.out_spec is not None
    program = Program(graph, entries, call.in_spec, call.out_spec)
    if exported.example_inputs is not None:
        program.examples = tuple(pytree.tree_leaves(exported.example_inputs))
    program.facts = frozenset({"functional", "dense_weights"})
    return program


def _check_examples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors:
        raise WrongInput(
            "no example input is a tensor",
            expected="a tuple of positional and a dict of keyword inputs with at least one tensor",
            found=f"{len(args)} positional, {len(kwargs)} keyword values",
            fix="pass example inputs, for instance planish.trace(model, (ids,))",
        )
    for tensor in tensors:
        if 0 in tensor.shape:
            raise WrongInput(
                "an example input is empty",
                expected="at least one element on every axis (two or more on free axes)",
                found=f"shape {list(tensor.shape)}",
                fix="pass an example with batch and length of at least 2",
            )


def _refuse_state(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind not in _RESULT_KINDS:
            raise StatefulModel(
                "the model writes to memory while it runs",
                where=str(spec.target),
                expected="a pure function of its inputs",
                found=f"{spec.kind.name.lower().replace('_', ' ')} of {spec.target}",
                fix="call it in eval() mode, and pass state (such as a cache) in and out",
            )


def _weight_entries(exported: ExportedProgram) -> Weights:
    """The tensors behind the graph's lifted inputs, ties under one name."""
    stored: dict[str, Tensor] = {}
    for spec in exported.graph_signature.input_specs:
        if spec.kind in _WEIGHT_KINDS and spec.target is not None:
            kept = exported.state_dict.get(spec.target)
            found: Any = kept if kept is not None else exported.constants[spec.target]
            stored[spec.target] = found.detach()
    tied = {n: t.detach() for n, t in exported.state_dict.items() if n not in stored}
    aliases = find_ties({**stored, **tied})
    entries: dict[str, Entry] = {n: t for n, t in stored.items() if n not in aliases}
    known = {alias: name for alias, name in aliases.items() if name in entries}
    return Weights(entries, known)


def _lift_weights(
    exported: ExportedProgram, functional: fx.Graph, aliases: Mapping[str, str]
) -> fx.Graph:
    """Copy the graph; lifted placeholders become get_attr nodes, inputs placeholders."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    by_name: dict[str, fx.Node] = {}
    nodes = list(functional.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    # by place: a copy of a graph gives other names to inputs that are called as a builtin is
    told = zip(placeholders, exported.graph_signature.input_specs, strict=True)
    specs = {node.name: spec for node, spec in told}
    inputs = [node for node in placeholders if specs[node.name].kind == InputKind.USER_INPUT]
    for node in inputs:
        mapping[node] = graph.placeholder(node.name)
        mapping[node].meta = _kept_meta(node)
        spec = specs[node.name].arg
        if isinstance(spec, ConstantArgument):
            mapping[node].meta["val"] = spec.value
    for node in placeholders:
        spec = specs[node.name]
        if spec.kind not in _WEIGHT_KINDS or not node.users:
            continue
        name = aliases.get(str(spec.target), str(spec.target))
        if name not in by_name:
            by_name[name] = graph.get_attr(name)
            by_name[name].meta = _kept_meta(node)
        mapping[node] = by_name[name]
    for node in nodes:
        if node.op == "output":
            results = _results(node, mapping)
            graph.output(results).meta = {}
        elif node.op != "placeholder":
            _refuse_nested(node)
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = _kept_meta(node)
            _name_epsilon(mapping[node])
    return graph


def _name_epsilon(node: fx.Node) -> None:
    """Write the epsilon that rms_norm takes from its dtype, which a float64 run would change."""
    if node.target is not torch.ops.aten.rms_norm.default or "val" not in node.meta:
        return
    given = [*node.args, None, None][:4]
    if given[3] is None and "eps" not in node.kwargs:
        kept: torch.dtype = node.meta["val"].dtype
        computed = kept if kept == torch.float64 else torch.float32
        node.args = (*given[:3], torch.finfo(computed).eps)


def _results(output: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> list[Any]:
    flat = list(output.args[0])  # type: ignore[arg-type]
    return [mapping[value] if isinstance(value, fx.Node) else value for value in flat]


def _refuse_nested(node: fx.Node) -> None:
    if node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator):
        raise CaptureFailed(
            f"the graph holds control flow that planish does not read: {node.target}",
            where=module_path(node),
            expected="one flat graph",
            found=f"%{node.name} = {node.target}",
            fix="capture the parts around it separately",
        )


def _kept_meta(node: fx.Node) -> dict[str, Any]:
    meta: dict[str, Any] = {"module": module_path(node)}
    if "val" in node.meta:
        meta["val"] = node.meta["val"]
    if node.meta.get("stack_trace"):
        meta["stack_trace"] = node.meta["stack_trace"]
    return meta


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that the node was traced in, "" at the root."""
    if "module" in node.meta:
        return node.meta["module"]
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    if path.startswith("_empty_nn_module_stack"):
        return ""
    path = path.removeprefix("L['self']").removeprefix(".")
    return path.replace("._modules", "").replace("['", ".").replace("']", "").lstrip(".")
