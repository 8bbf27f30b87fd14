"""A lowered program as Python source: a line an operation, values dropped after their last use."""

from __future__ import annotations

import math
import operator
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.errors import UnsupportedByTarget
from ..ir.graph_json import FUNCTIONS
from ..ir.ops import REFERENCES
from ..ir.program import Node, Program
from ..ir.text import value_names
from .kernel_call import KernelCall
from .region import Region
from .region import _getitem as getitem
from .region_source import Source, epilogue_source, prologue_source, region_source
from .triton_sizes import Sizes

_FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}
_PROVENANCE = 4  # source modules that a generated kernel names before it only counts them


@dataclass
class ModelSource:
    """Texts of a package: model.py, generated.py, and what of ours they call.

    roots: (module, name) pairs that `extract_source.extract` follows. kernels: of each generated
    kernel the operations and modules that it came from.
    """

    model: str
    generated: str
    roots: list[tuple[str, str]]
    kernels: dict[str, list[str]]


def model_source(program: Program) -> ModelSource:
    """Sources of a lowered program; raises UnsupportedByTarget for an operation without a form."""
    return _Writer(program).source()


@dataclass
class _Generated:
    """One generated function, shared by all places whose text is the same."""

    name: str
    source: Source
    origins: list[str] = field(default_factory=list[str])

    @property
    def imported(self) -> str:
        """What model.py uses: of a kernel of its own the plan, else the function."""
        planned = "{name}_plan(" in self.source.text
        return f"{self.name}_plan" if planned else self.name


class _Writer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.names = value_names(program.graph)
        self.lines: list[str] = []
        self.generated: dict[str, _Generated] = {}
        self.roots: dict[tuple[str, str], str] = {}
        self.sizes = Sizes()

    def source(self) -> ModelSource:
        self._bind_inputs()
        last = self._last_uses()
        module = ""
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                here = node.meta.get("module", "")
                if here != module:
                    module = here
                    self.lines.append(f"# {module or 'the root module'}")
                self.lines.append(f"{node.name} = {self._call(node)}")
                done = [read.name for read in last.get(node, ())]
                if done:
                    self.lines.append(f"del {', '.join(done)}")
            elif node.op == "output":
                results = ", ".join(self._text(value) for value in node.args[0])
                self.lines.append(f"return [{results}]")
        return ModelSource(self._model(), self._kernels(), list(self.roots), self._origins())

    # ---- inputs and lifetimes

    def _bind_inputs(self) -> None:
        for node in self.program.inputs:
            value = node.meta["val"]
            if isinstance(value, Tensor):
                self.lines += self.sizes.bind(node)
            else:
                self.lines.append(f"{node.name} = {self._constant(node, value)}")

    def _constant(self, node: Node, value: Any) -> str:
        """An input that was captured as a constant."""
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise UnsupportedByTarget(
                "a package takes tensors, and an input of the program is a number",
                where=f"input {node.name}",
                fix="trace the model with that number as a tensor or as a constant",
            )
        return self._text(value)

    def _last_uses(self) -> dict[Node, list[Node]]:
        last: dict[Node, Node] = {}
        for node in self.program.graph.nodes:
            for read in node.all_input_nodes:
                last[read] = node
        done: dict[Node, list[Node]] = {}
        for value, reader in last.items():
            if value.op == "call_function" and reader.op == "call_function":
                done.setdefault(reader, []).append(value)
        return done

    # ---- operations

    def _call(self, node: Node) -> str:
        target: Any = node.target
        if isinstance(target, Region):
            return self._region(node, target)
        if isinstance(target, KernelCall):
            return self._kernel(node, target)
        if target in (getitem, operator.getitem):
            return f"{self._text(node.args[0])}[{node.args[1]}]"
        arguments = [self._text(value) for value in node.args]
        arguments += [f"{key}={self._text(value)}" for key, value in node.kwargs.items()]
        return f"{self._target(target, node)}({', '.join(arguments)})"

    def _target(self, target: Any, node: Node) -> str:
        if isinstance(target, torch._ops.OpOverload):
            namespace, name = target._schema.name.split("::")
            if namespace != "planish":
                return f"torch.ops.{namespace}.{name}.{target._overloadname}"
            if name in REFERENCES:
                reference = REFERENCES[name]
                return self._root(reference.__module__, reference.__name__, f"{name}_reference")
        if target in _FUNCTION_NAMES:
            return _FUNCTION_NAMES[target]
        raise UnsupportedByTarget(
            "an operation has no form outside of planish",
            where=f"%{self.names[node]} from {node.meta.get('module') or 'the root module'}",
            found=str(target),
            fix="export to another target",
        )

    def _root(self, module: str, name: str, alias: str) -> str:
        return self.roots.setdefault((module, name), alias)

    def _region(self, node: Node, region: Region) -> str:
        return f"run({self._region_plan(node, region, node.args)})"

    def _region_plan(self, node: Node, region: Region, inputs: Sequence[Any]) -> str:
        source = region_source(region)
        made = self._define(source, region)
        where, shape = f"%{node.meta.get('named', node.name)}", self.sizes.shape
        leads = ["None" if lead is None else shape(lead, where) for lead in source.leads]
        shapes = [shape(result.meta["val"].shape, where) for result in region.results]
        space = source.space
        sizes = [self.sizes.text(space.rows, where), self.sizes.text(space.columns, where)]
        arguments = [self._text(value) for value in inputs]
        arguments += [_tuple(shapes), _tuple(leads), *sizes]
        return f"{made.name}_plan({', '.join(arguments)})"

    def _kernel(self, node: Node, call: KernelCall) -> str:
        planner = call.planner or call.spec.plan.__module__
        alias = self._root(planner, "plan", f"{planner.rpartition('.')[2]}_plan")
        given: dict[str, Any] = dict(node.kwargs)
        operands, sources = given.pop("operands", ()), given.pop("sources", ())
        arguments = [f"{key}={self._text(value)}" for key, value in given.items()]
        if call.epilogue is not None:
            made = self._define(epilogue_source(call.epilogue), call.epilogue)
            bias = self._text(given.get("bias"))
            arguments.append(f"finish={made.name}")
            arguments.append(f"operands={_tuple([bias, *(self._text(o) for o in operands)])}")
        if call.prologue is not None:
            made = self._define(prologue_source(call.prologue), call.prologue)
            separate = self._region_plan(node, call.prologue, [given["x"], *sources])
            prologue = self._root("planish.kernels.prologue", "Prologue", "Prologue")
            read = _tuple([self._text(source) for source in sources])
            arguments.append(f"prologue={prologue}({made.name}, {read}, lambda: {separate})")
        return f"run({alias}({', '.join([*arguments, 'arch=arch'])}))"

    def _define(self, source: Source, region: Region) -> _Generated:
        made = self.generated.get(source.text)
        if made is None:
            made = _Generated(f"fused_{source.words[:60]}_{len(self.generated)}", source)
            self.generated[source.text] = made
        named = ", ".join(f"%{member.meta.get('named', member.name)}" for member in region.members)
        modules = dict.fromkeys(m.meta.get("module", "") or "the root" for m in region.members)
        made.origins.append(f"{named} from {', '.join(modules)}")
        return made

    # ---- arguments

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"w[{str(value.target)!r}]" if value.op == "get_attr" else value.name
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._text(part) for part in value)}]"
        if isinstance(value, torch.device):
            return "device"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        return repr(value)

    # ---- files

    def _model(self) -> str:
        names = [n.name for n in self.program.inputs if isinstance(n.meta["val"], Tensor)]
        head = ["from __future__ import annotations", "", "import math", "import operator", ""]
        head += ["import torch", ""]
        used = sorted(made.imported for made in self.generated.values())
        for made in used:
            head.append(f"from .generated import {made}")
        for (module, name), alias in self.roots.items():
            head.append(f"from .kernels.{package_file(module)} import {name} as {alias}")
        arguments = ", ".join(["run", "w", "device", "arch", *names])
        doc = '"""The model, operation by operation. run: makes the launches of a plan."""\n'
        body = [f"    {line}" for line in self.lines]
        return "\n".join([doc, *head, "", "", f"def forward({arguments}):", *body, ""])

    def _kernels(self) -> str:
        head = [
            '"""Kernels that were generated for this model, each with what it was fused from."""\n',
            "from __future__ import annotations\n",
            "import torch",
            "import triton",
            "import triton.language as tl\n",
            "from .kernels.activation import activate, tanh",
            "from .kernels.epilogue import operand",
            "from .kernels.launch import Launch, Plan",
            "from .kernels.operand_views import as_rows, as_vector",
            "from .kernels.prologue import prologue_source",
        ]
        parts = [
            made.source.named(made.name, _provenance(made)) for made in self.generated.values()
        ]
        return "\n".join(head) + "".join(f"\n\n\n{part.rstrip()}" for part in parts) + "\n"

    def _origins(self) -> dict[str, list[str]]:
        return {made.name: made.origins for made in self.generated.values()}


def _provenance(made: _Generated) -> str:
    shown = made.origins[:_PROVENANCE]
    more = len(made.origins) - len(shown)
    lines = [*shown, f"and {more} more places"] if more else shown
    wrapped = [part for line in lines for part in textwrap.wrap(line, 92, break_on_hyphens=False)]
    return "\n    ".join(wrapped) + ("\n    " if len(wrapped) > 1 else "")


def _tuple(parts: list[str]) -> str:
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def package_file(module: str) -> str:
    """The file of one of our modules in a package, without .py."""
    parts = module.split(".")[1:]
    return parts[-1] if parts[0] == "kernels" else "_".join(parts)


GENERATED_ROOTS = (
    ("planish.kernels.activation", "activate"),
    ("planish.kernels.activation", "tanh"),
    ("planish.kernels.epilogue", "operand"),
    ("planish.kernels.launch", "Launch"),
    ("planish.kernels.launch", "Plan"),
    ("planish.kernels.operand_views", "as_rows"),
    ("planish.kernels.operand_views", "as_vector"),
    ("planish.kernels.prologue", "prologue_source"),
)
"""What every generated.py imports."""
