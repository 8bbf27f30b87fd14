"""Capture of one graph that TorchDynamo hands to a compiler: it becomes a Program.

Dynamo's graph holds torch functions and takes the model's weights as inputs, next to the user's
tensors and the free sizes (SymInts). It is traced, in Dynamo's own fake tensor mode so that the
sizes keep their symbols, to the form that `capture` also gives: functional ATen with `linear`,
`layer_norm` and `scaled_dot_product_attention` whole. Only pure functions are captured.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo import exc
from torch._functorch.aot_autograd import aot_export_module
from torch.utils import _pytree as pytree

from .capture import module_path
from .errors import CaptureFailed, StatefulModel
from .program import Program
from .weights import Entry, Weights

_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class DynamoCapture:
    """A program, and how it takes the arguments of Dynamo's graph.

    weights: for each argument of Dynamo's graph, in order, the name of the weight that it is, or
    None for an input of the program (the program's inputs keep Dynamo's order).
    """

    program: Program
    weights: tuple[str | None, ...]


def capture_dynamo(module: fx.GraphModule, arguments: Sequence[Any]) -> DynamoCapture:
    """Make a Program of Dynamo's graph; its dense weights share memory with `arguments`.

    arguments: the tensors and SymInts that Dynamo gives to a backend. The module is not changed.
    Raises StatefulModel if the graph writes to an input or draws random numbers, CaptureFailed if
    it cannot be traced or holds what a program cannot.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    module = _with_fixed_floats(module, inputs)
    fakes = [node.meta["example_value"] for node in inputs]
    try:
        traced, signature = aot_export_module(
            module, fakes, trace_joint=False, pre_dispatch=True, decompositions={}
        )
    except (exc.RestartAnalysis, exc.SkipFrame):  # Dynamo's own control flow
        raise
    except Exception as error:  # torch's many ways to fail are one to the caller
        raise CaptureFailed(
            "the graph could not be traced to functional form",
            expected="operations that torch can functionalize",
            found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
        ) from error
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if written:
        raise StatefulModel(
            "the model writes to its inputs or buffers while it runs",
            expected="a pure function of its inputs",
            found=f"{len(written)} tensors written in place",
        )
    own: list[str] = [*signature.parameters, *signature.buffers]
    names = [_weight_name(node) for node in inputs]
    return _Builder(traced, module, own, inputs, _distinct(names)).build(arguments)


class _Builder:
    """Turns the traced graph module into a program."""

    def __init__(
        self,
        traced: Any,
        module: fx.GraphModule,
        own: list[str],
        inputs: list[fx.Node],
        names: list[str | None],
    ) -> None:
        self.traced, self.module, self.own = traced, module, own
        self.inputs, self.names = inputs, names
        self.graph = fx.Graph()
        self.mapping: dict[fx.Node, fx.Node] = {}
        self.entries: dict[str, Entry] = {}

    def build(self, arguments: Sequence[Any]) -> DynamoCapture:
        placeholders = self.traced.graph.find_nodes(op="placeholder")
        lifted, given = placeholders[: len(self.own)], placeholders[len(self.own) :]
        user: list[Any] = []
        for node, source, name, value in zip(
            given, self.inputs, self.names, arguments, strict=True
        ):
            if name is None:
                self._keep(node, self.graph.placeholder(source.name))
                user.append(value)
        for name, node in zip(self.own, lifted, strict=True):
            self._weight(node, f"constant.{name}", operator.attrgetter(name)(self.module))
        for node, name, value in zip(given, self.names, arguments, strict=True):
            if name is not None:
                self._weight(node, name, value)
        for node in self.traced.graph.nodes:
            if node.op == "get_attr":
                value = operator.attrgetter(node.target)(self.traced)
                self._weight(node, f"constant.{node.target}", value)
        results = self._calls()
        program = Program(
            self.graph,
            Weights(self.entries),
            pytree.tree_flatten((tuple(user), {}))[1],
            pytree.tree_flatten([0] * len(results))[1],
            frozenset({"functional", "dense_weights"}),
            metadata={"source": "torch.compile"},
        )
        return DynamoCapture(program, tuple(self.names))

    def _keep(self, old: fx.Node, new: fx.Node) -> None:
        self.mapping[old] = new
        new.meta = {"module": module_path(old)}
        if "val" in old.meta:
            new.meta["val"] = old.meta["val"]
        if old.meta.get("stack_trace"):
            new.meta["stack_trace"] = old.meta["stack_trace"]

    def _weight(self, node: fx.Node, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            raise CaptureFailed(
                "the graph holds something that is not a tensor",
                where=name,
                expected="tensors",
                found=type(value).__name__,
            )
        self.entries[name] = value.detach()
        if node.users:
            self._keep(node, self.graph.get_attr(name))
            self.mapping[node].meta.setdefault("val", node.meta.get("val"))

    def _calls(self) -> list[Any]:
        results: list[Any] = []
        for node in self.traced.graph.nodes:
            if node.op == "output":
                flat = pytree.tree_leaves(node.args[0], is_leaf=lambda leaf: leaf is None)
                results = [self.mapping[r] if isinstance(r, fx.Node) else r for r in flat]
                self.graph.output(results).meta = {}
            elif node.op == "call_function":
                if node.target is torch._C._set_grad_enabled:
                    continue  # without meaning where nothing requires gradients
                source = _passed_through(node)
                if source is not None:
                    self.mapping[node] = self.mapping[source]
                    continue
                _refuse_impure(node)
                self._keep(node, self.graph.node_copy(node, lambda n: self.mapping[n]))
            elif node.op not in ("placeholder", "get_attr"):
                raise _not_flat(node)
        return results


def _passed_through(node: fx.Node) -> fx.Node | None:
    """The input of a node that does nothing in inference: dropout, and an alias of a value."""
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix("aten::")
    first = node.args[0] if node.args else None
    idle = name == "alias" or (name in _DROPOUTS and not (node.args[2] and node.args[1]))
    return first if idle and isinstance(first, fx.Node) else None


def _refuse_impure(node: fx.Node) -> None:
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload):
        if isinstance(target, torch._ops.HigherOrderOperator) or not _is_scalar_function(target):
            raise _not_flat(node)
        return
    random = torch.Tag.nondeterministic_seeded in target.tags
    if target is _ATTENTION:
        random = bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0))
    if random or target._schema.is_mutable:
        raise StatefulModel(
            "the model draws random numbers" if random else "the model writes to memory",
            where=module_path(node),
            expected="a pure function of its inputs, as in eval() mode",
            found=str(target),
        )


def _is_scalar_function(target: Any) -> bool:
    """Whether it computes on Python numbers and sizes: operator.mul, math.ceil, torch.sym_max."""
    home = getattr(target, "__module__", "")
    name = getattr(target, "__name__", "")
    return home in ("_operator", "operator", "math") or name.startswith("sym_")


def _not_flat(node: fx.Node) -> CaptureFailed:
    return CaptureFailed(
        "the graph holds something other than operations on tensors and sizes",
        where=module_path(node),
        expected="one flat graph of operations",
        found=f"%{node.name} = {node.target}",
    )


def _with_fixed_floats(module: fx.GraphModule, inputs: list[fx.Node]) -> fx.GraphModule:
    """A copy in which the model's own Python numbers are constants, guarded by Dynamo.

    With every size free, Dynamo passes an epsilon as a tensor too. A number that the caller gives
    may differ from call to call and is refused: CaptureFailed.
    """
    numbers = {node.name for node in inputs if _is_number(node)}
    if not numbers:
        return module
    copied = fx.GraphModule(module, fx.Graph())
    copied.graph.output(copied.graph.graph_copy(module.graph, mapping := {}))
    copied.meta = dict(module.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
        if old.op == "placeholder" and old.name in numbers:
            _fix_number(old, new)
    copied.recompile()
    return copied


def _is_number(node: fx.Node) -> bool:
    value = node.meta["example_value"]
    return isinstance(value, Tensor) and getattr(value, "item_memo", None) is not None


def _fix_number(old: fx.Node, new: fx.Node) -> None:
    source = old.meta["grapharg"].source
    if not _of_module(source):
        raise CaptureFailed(
            "a Python number is an input of the graph",
            where=source.name,
            expected="tensors and sizes",
            found="a float that Dynamo lets vary from call to call",
        )
    value = float(old.meta["example_value"].item_memo)  # adds Dynamo's guard on the value
    for user in list(new.users):
        if user.op == "call_method" and user.target == "item":
            user.replace_all_uses_with(value)  # type: ignore[arg-type]
            user.graph.erase_node(user)


def _of_module(source: Any) -> bool:
    kind = source.guard_source
    return kind.is_unspecialized_nn_module() or kind.is_unspecialized_builtin_nn_module()


def _weight_name(node: fx.Node) -> str | None:
    """The model's own dotted name of a parameter or buffer; None for any other input."""
    if not isinstance(node.meta["example_value"], Tensor):
        return None
    path: str = node.meta["grapharg"].source.name
    kept = re.fullmatch(r"(.*)\._(?:parameters|buffers)\['([^']+)'\]", path)
    if kept is None:
        return None
    owners = re.findall(r"_modules\['([^']+)'\]", kept[1])
    return ".".join([*owners, kept[2]])


def _distinct(names: list[str | None]) -> list[str | None]:
    """Two models in one graph may use one name: later ones get a suffix."""
    seen: dict[str, int] = {}
    distinct: list[str | None] = []
    for name in names:
        if name is not None:
            seen[name] = seen.get(name, 0) + 1
            name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        distinct.append(name)
    return distinct
