"""A program as a plain GraphModule, for compilers and targets that want one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from .program import Program


def graph_module(program: Program, weight: Callable[[str], Tensor] | None = None) -> fx.GraphModule:
    """Wrap a copy of the program's graph over flat inputs; returns a tuple of flat outputs.

    weight: gives the tensor for a weight's name; by default the dense one. Weights become buffers
    of a flat root under names made valid for attributes, in the order in which they are used.
    """
    read = weight or program.weights.__getitem__
    root = torch.nn.Module()
    copied = program.copy()
    names: dict[str, str] = {}
    for node in copied.weight_nodes():
        name = str(node.target)
        if name not in names:
            names[name] = f"w{len(names)}_" + "".join(c if c.isalnum() else "_" for c in name)
            root.register_buffer(names[name], read(name))
        node.target = names[name]
    output = copied.output
    output.args = (tuple(output.args[0]),)  # type: ignore[arg-type]
    module = fx.GraphModule(root, copied.graph)
    module.meta["weight_names"] = {attribute: name for name, attribute in names.items()}
    return module
