"""Serve several adapters from one base: each row of a batch names the one that it wants.

Before: `%y = linear(%x, %W)`. After: `%y = adapters(linear(%x, %W), %x, %A, %B, %scale, %adapter)`
with all adapters' factors stacked, and one more keyword input, `adapter` int32[batch]; -1 is the
base alone. Row for row equal to running the base with that adapter: a row's sums read nothing of
the other rows. The base's weights stay as they are, encoded or not. With `branches` the adapters
are those that the graph holds (`serve_branches`), each beside the product that it was added to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.edit import Editor, same_size, shape, value_of
from ..ir.errors import WrongOption
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.read_lora import CannotServe, LoraFactors, read_lora
from .contract import Context, Pass, contract
from .serve_branches import adapter_names, find_branches, put_adapters

_ATEN = torch.ops.aten
ADAPTER = "adapter"
_PRODUCTS = {
    _ATEN.linear.default: ("input", "weight"),
    _ATEN.addmm.default: ("mat1", "mat2"),
    _ATEN.mm.default: ("self", "mat2"),
    _ATEN.matmul.default: ("self", "other"),
}
_MOST_TOLD = 10


@dataclass(frozen=True)
class ServeAdapters(Pass):
    """Keep the LoRA folders of `adapters` ("PATH;PATH") apart, chosen by the input `adapter`.

    Index 0 is the first folder; -1 none. branches: instead of folders, the low-rank branches that
    were captured with the model; those of one name are one adapter, the first found has index 0.
    """

    adapters: str = ""
    branches: bool = False

    contract = contract("bounded", requires=["functional"], changes_interface=True)

    def run(self, program: Program, context: Context) -> None:
        folders = [part.strip() for part in self.adapters.split(";") if part.strip()]
        if bool(folders) == self.branches:
            raise WrongOption(
                "serve_adapters was given no adapters, or folders and branches at once",
                expected="adapters=FOLDER;FOLDER, or branches=true",
                fix="name one or more folders of LoRA adapters",
            )
        if self.branches:
            self._from_graph(program, context)
        else:
            self._from_folders(program, context, folders)

    def _from_folders(self, program: Program, context: Context, folders: list[str]) -> None:
        loaded = [read_lora(folder, program.weights) for folder in folders]
        places = _places(program, folders, loaded)
        batch = _batch(program)
        served = [(n, w, f) for n, w, f in places if context.journal.offers()]
        if not served:
            return
        editor = Editor(program)
        chosen = _add_input(program, editor, batch)
        stacks: dict[str, list[Node]] = {}
        for done, (node, weight, factors) in enumerate(served):
            context.progress(done, len(served), self.pass_name())
            if weight not in stacks:
                stacks[weight] = _stack(editor, weight, factors, value_of(node).dtype)
            new = _serve(editor, node, stacks[weight], chosen, batch)
            context.journal.noted(self.pass_name(), new, f"{len(folders)} adapters")

    def _from_graph(self, program: Program, context: Context) -> None:
        found = find_branches(program)
        names, batch = adapter_names(found), _batch(program)
        for one in found:
            _check_rows(one.region.source, batch)
        if not context.journal.offers():  # all or none: a branch that is left is always active
            return
        editor = Editor(program)
        chosen = _add_input(program, editor, batch)
        for done, one in enumerate(found):
            context.progress(done, len(found), self.pass_name())
            factors = [one.factors.get(name) for name in names]
            stack = _stack(editor, one.weight, factors, value_of(one.base).dtype)
            new = put_adapters(editor, one, stack, chosen)
            told = ", ".join(f"{names.index(name)} is {name}" for name in one.factors)
            context.journal.noted(self.pass_name(), new, told)
        editor.sweep()


Place = tuple[Node, str, list[LoraFactors | None]]


def _places(
    program: Program, folders: Sequence[str], loaded: Sequence[Mapping[str, LoraFactors]]
) -> list[Place]:
    """Products, their weights, and for each adapter its factors there; raises CannotServe."""
    readers: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        names = _PRODUCTS.get(node.target)
        weight = bound_arguments(node)[names[1]] if names else None
        if isinstance(weight, Node) and weight.op == "get_attr":
            readers.setdefault(str(weight.target), []).append(node)
    wrong: list[str] = []
    factors: dict[str, list[LoraFactors | None]] = {}
    for place, (folder, modules) in enumerate(zip(folders, loaded, strict=True)):
        for module, found in modules.items():
            name = _weight_name(module, program)
            if name is None or name not in readers:
                wrong.append(f"{folder}: {module} has no matmul with a weight of its own here")
                continue
            sizes = _sizes(readers[name][0])
            if (found.a.shape[1], found.b.shape[0]) != sizes:
                own = [found.b.shape[0], found.a.shape[1]]
                wrong.append(f"{folder}: {module} is {own}, the weight {list(sizes[::-1])}")
                continue
            factors.setdefault(name, [None] * len(folders))[place] = found
    if wrong:
        more = f"; and {len(wrong) - _MOST_TOLD} more" if len(wrong) > _MOST_TOLD else ""
        raise CannotServe(
            "adapters do not fit this base",
            expected="modules of this program, with weights of their sizes [out, in]",
            found="; ".join(wrong[:_MOST_TOLD]) + more,
            fix="serve adapters of this base, before its matmuls are fused",
        )
    return [(node, name, f) for name, f in factors.items() for node in readers[name]]


def _weight_name(module: str, program: Program) -> str | None:
    """The weight of a module; a base captured without its outer model has shorter names."""
    wanted = f"{module}.weight"
    while wanted not in program.weights and "." in wanted.removesuffix(".weight"):
        wanted = wanted.partition(".")[2]
    return program.weights.canonical(wanted) if wanted in program.weights else None


def _sizes(node: Node) -> tuple[Any, Any]:
    """Channels going in and coming out of a product."""
    return shape(_input(node))[-1], shape(node)[-1]


def _input(node: Node) -> Node:
    return bound_arguments(node)[_PRODUCTS[node.target][0]]  # type: ignore[index]


def _batch(program: Program) -> Any:
    for node in program.inputs:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    raise CannotServe("no input has a batch", expected="an input with a first axis")


def _add_input(program: Program, editor: Editor, batch: Any) -> Node:
    """The placeholder adapter int32[batch], the last input, and its place in the call."""
    if any(node.name == ADAPTER for node in program.inputs):
        raise CannotServe(f"the program has an input {ADAPTER} already")
    with program.graph.inserting_after(program.inputs[-1]):
        node = program.graph.placeholder(ADAPTER)
    with editor.mode:
        node.meta["val"] = torch.empty((batch,), dtype=torch.int32)
    node.meta["module"] = ""
    args, kwargs = pytree.tree_unflatten([0] * program.in_spec.num_leaves, program.in_spec)
    program.in_spec = pytree.tree_structure((args, {**kwargs, ADAPTER: 0}))
    if program.examples:
        first = next(v for v in program.examples if isinstance(v, Tensor) and v.dim())
        none = torch.full((first.shape[0],), -1, dtype=torch.int32)
        program.examples = (*program.examples, none)
    return node


def _stack(
    editor: Editor, weight: str, factors: Sequence[LoraFactors | None], dtype: torch.dtype
) -> list[Node]:
    """The weights a [adapters, rank, in], b [adapters, out, rank] and scale [adapters]."""
    known = [f for f in factors if f is not None]
    rank = max(int(f.a.shape[0]) for f in known)
    a = torch.zeros(len(factors), rank, known[0].a.shape[1], dtype=dtype)
    b = torch.zeros(len(factors), known[0].b.shape[0], rank, dtype=dtype)
    scale = torch.zeros(len(factors), dtype=dtype)
    for place, found in enumerate(factors):
        if found is not None:
            own = found.a.shape[0]
            a[place, :own], b[place, :, :own] = found.a.to(dtype), found.b.to(dtype)
            scale[place] = found.scale
    module = weight.removesuffix(".weight")
    named = {"adapters_a": a, "adapters_b": b, "adapters_scale": scale}
    return [editor.weight(f"{module}.{name}", value) for name, value in named.items()]


def _serve(editor: Editor, node: Node, stack: Sequence[Node], chosen: Node, batch: Any) -> Node:
    x = _input(node)
    _check_rows(x, batch)
    with editor.graph.inserting_after(node):
        new = editor.graph.call_function(
            torch.ops.planish.adapters.default, (node, x, *stack, chosen)
        )
    new.meta = {"module": node.meta.get("module", ""), "val": node.meta["val"]}
    editor.replace(node, new)
    return new


def _check_rows(x: Node, batch: Any) -> None:
    if not _begins_with(shape(x)[0], batch):
        raise CannotServe(
            f"what reads %{x.name} does not go row by row of the batch",
            where=x.meta.get("module", ""),
            expected=f"values whose first axis is {batch}, or {batch} joined with the next",
            found=str(list(shape(x))),
            fix="merge the adapter: merge_adapters",
        )


def _begins_with(size: Any, batch: Any) -> bool:
    """Whether an axis is the batch, or the batch with what follows it in memory."""
    if same_size(size, batch):
        return True
    if isinstance(size, int) or isinstance(batch, int):
        return isinstance(size, int) and isinstance(batch, int) and size % batch == 0
    return size.node.expr.is_Mul and batch.node.expr in size.node.expr.args
