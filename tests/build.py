"""Programs written down node by node, without a model or an export.

def body(x, w):
    return op.relu(op.linear(x, w))

program = build.program(body, {"x": torch.randn(3, 5)}, {"layer.w": torch.randn(7, 5)})
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from planish.ir.edit import Editor
from planish.ir.program import Node, Program
from planish.ir.sizes_json import Sizes
from planish.ir.weights import Entry, Weights
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


def program(
    body: Callable[..., Any],
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Entry] | None = None,
    free: bool = True,
) -> Program:
    """Call `body` with the nodes of inputs and weights, in order; it returns one node or several.

    With `free`, the first axis of every input with a first axis is one common free axis.
    """
    sizes = Sizes({"s0": 4}, "a test")
    mode = FakeTensorMode(shape_env=sizes.env, allow_non_fake_inputs=True)
    graph = fx.Graph()
    arguments: list[Node] = []
    for name, value in inputs.items():
        node = graph.placeholder(name)
        shape: list[Any] = list(value.shape)
        if free and shape:
            shape[0] = sizes.size("s0")
        with mode:
            node.meta = {"module": "", "val": torch.empty(shape, dtype=value.dtype)}
        arguments.append(node)
    output = graph.output([])
    leaves = tuple(inputs.values())
    in_spec = pytree.tree_flatten((leaves, {}))[1]
    made = Program(graph, Weights(weights or {}), in_spec, in_spec, examples=leaves)
    made.facts = frozenset({"functional", "dense_weights"})
    editor = Editor(made)
    arguments += [editor.weight(name) for name in weights or {}]
    with editor.at(output, "") as editor:
        results = body(*arguments)
    flat = list(results) if isinstance(results, (tuple, list)) else [results]
    output.args = (flat,)
    made.out_spec = pytree.tree_flatten(flat)[1]
    return made


def inside(module: str) -> Any:
    """`with inside("layers.0"):` nodes of the body are told to come from that module."""
    from planish.ir.edit import current_editor

    editor = current_editor()
    return editor.at(next(n for n in editor.graph.nodes if n.op == "output"), module)
