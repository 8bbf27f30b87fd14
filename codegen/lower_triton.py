"""Lower a program to Triton: named kernels, their epilogues, and generated kernels around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from ..ir.edit import Editor
from ..ir.program import Node, Program
from ..ir.text import value_names
from .find_regions import find_regions, saved_bytes
from .gpu_adapters import lower_adapters
from .gpu_attention import lower_attentions, lower_rotaries
from .gpu_calls import Calls
from .gpu_products import fuse_epilogues, fuse_prologues, lower_products, lower_tables
from .kernel_call import KernelCall
from .region import Region, cut_region, put_region


@dataclass
class TritonLowering:
    """A lowered copy of a program, still runnable by torch.

    sentences: for every operation that has a kernel and does not use it, why. saved: bytes that
    each region saves, symbolic where sizes are.
    """

    program: Program
    sentences: list[str]
    regions: list[Region] = field(default_factory=list[Region])
    saved: dict[Region, object] = field(default_factory=dict[Region, object])

    @property
    def launches(self) -> int:
        """Nodes that a Triton kernel computes."""
        nodes = self.program.graph.nodes
        return sum(isinstance(node.target, (KernelCall, Region)) for node in nodes)


def lower_for_triton(program: Program, archs: Sequence[str] = ("sm_80",)) -> TritonLowering:
    """A copy whose kernels run on every one of the architectures; the program stays as it is."""
    lowered = program.copy()
    for node, name in value_names(lowered.graph).items():
        node.meta["named"] = name  # for whoever reads what a kernel was made of
    editor = Editor(lowered)
    calls = Calls(editor, archs)
    sentences = [*lower_products(calls), *lower_tables(calls)]
    sentences += [*lower_rotaries(calls), *lower_attentions(calls), *lower_adapters(calls)]
    editor.sweep()
    fuse_epilogues(calls)
    result = TritonLowering(lowered, sentences)
    for members in find_regions(lowered.graph):
        region = cut_region(members)
        result.saved[region] = saved_bytes(members)
        put_region(region, lowered.graph)
        result.regions.append(region)
    fuse_prologues(calls)
    sort_nodes(lowered.graph)
    lowered.graph.lint()
    return result


def sort_nodes(graph: fx.Graph) -> None:
    """Order nodes so that values come before their readers, otherwise as they were."""
    placed: set[Node] = set()
    for node in list(graph.nodes):
        _place(node, placed)


def _place(node: Node, placed: set[Node]) -> None:
    """Move what a node reads before it, innermost first, without recursion."""
    stack = [node]
    while stack:
        top = stack[-1]
        missing = [read for read in top.all_input_nodes if read not in placed]
        if missing and top not in placed:
            stack += missing
            continue
        stack.pop()
        if top not in placed:
            placed.add(top)
            if top is not node:
                node.prepend(top)
