"""The few verbs that change a graph: emit, weight, replace, sweep.

An `Editor` keeps `meta["val"]` and `meta["module"]` true: every emitted node is run on the fake
values of its arguments, which is also the first check of the edit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .errors import PatternError
from .infer_values import Inference
from .program import Node, Program
from .weights import Entry

_CURRENT: ContextVar[Editor | None] = ContextVar("planish_editor", default=None)


def current_editor() -> Editor:
    """The editor whose `at` block we are in; raises PatternError outside of one."""
    editor = _CURRENT.get()
    if editor is None:
        raise PatternError(
            "an operation was emitted outside of a rewrite",
            fix="call op.* in a pattern, in the function given to `.to`, or inside `Editor.at`",
        )
    return editor


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The mode in which the graph's values were traced; a new one if it has none."""
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


class Editor:
    """An open edit of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.mode = fake_mode(program.graph)
        self.module = ""

    @contextlib.contextmanager
    def at(self, node: Node, module: str | None = None) -> Generator[Editor]:
        """Emit before `node`; new nodes are told to come from its module (or from `module`)."""
        token = _CURRENT.set(self)
        before = self.module
        self.module = node.meta.get("module", "") if module is None else module
        try:
            with self.graph.inserting_before(node):
                yield self
        finally:
            self.module = before
            _CURRENT.reset(token)

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Append a call at the cursor."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["module"] = self.module
        node.meta["val"] = infer(node, self.mode)
        return node

    def weight(self, name: str, entry: Entry | None = None) -> Node:
        """The node of a weight; with an entry, a new weight (renamed if the name is taken)."""
        weights = self.program.weights
        if entry is not None:
            name = weights.fresh_name(name)
            weights[name] = entry
        name = weights.canonical(name)
        for node in self.graph.nodes:
            if node.op == "get_attr" and node.target == name:
                return node
        with self.graph.inserting_before(self._first_call()):
            node = self.graph.get_attr(name)
        node.meta["module"] = name.rpartition(".")[0]
        with self.mode:
            node.meta["val"] = torch.empty(weights.shape(name), dtype=weights.dtype(name))
        return node

    def _first_call(self) -> Node:
        for node in self.graph.nodes:
            if node.op in ("call_function", "output"):
                return node
        raise AssertionError("a graph always ends in an output node")

    def replace(self, old: Node, new: Node) -> None:
        """Every reader of `old` reads `new` (but for the nodes that `new` itself was made of)."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def sweep(self) -> int:
        """Erase what nobody reads; returns how many nodes went. Unused weights go too."""
        gone = 0
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                if node.op == "call_function" and not is_pure(node):
                    continue
                self.graph.erase_node(node)
                gone += 1
        kept = {str(node.target) for node in self.program.weight_nodes()}
        for name in [name for name in self.program.weights if name not in kept]:
            del self.program.weights[name]
        return gone


def is_pure(node: Node) -> bool:
    """Whether the node only computes a value (assertions and random numbers do more).

    Operators that could draw random numbers for dropout are pure when told to drop nothing.
    """
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable or "assert" in target._schema.name:
            return False
        return torch.Tag.nondeterministic_seeded not in target.tags or _drops_nothing(node)
    return True


def _drops_nothing(node: Node) -> bool:
    target: Any = node.target
    for place, argument in enumerate(target._schema.arguments):
        given = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
        value = argument.default_value if given is None else given
        if argument.name == "train" and value is False:
            return True
        if argument.name in ("dropout_p", "p"):
            return bool(value == 0)
    return False


def infer(node: Node, mode: FakeTensorMode) -> Any:
    """The value of a node on the fake values of its arguments."""
    return Inference.of(mode).call(node)


def shape(node: Node) -> list[Any]:
    """The node's sizes: ints, or SymInts where free."""
    return list(value_of(node).shape)


def value_of(node: Node) -> Tensor:
    """The node's fake tensor; raises PatternError if it is not a tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise PatternError(f"%{node.name} is not a tensor", found=type(value).__name__)
    return value


def same_shape(a: Node, b: Node) -> bool:
    """Whether two values have provably the same sizes."""
    return len(shape(a)) == len(shape(b)) and all(
        same_size(x, y) for x, y in zip(shape(a), shape(b), strict=True)
    )


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes, symbolic or not, are provably equal; adds no guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left = a.node.expr if isinstance(a, torch.SymInt) else a
    right = b.node.expr if isinstance(b, torch.SymInt) else b
    return bool(left == right)
