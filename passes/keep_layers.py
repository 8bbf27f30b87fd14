"""Keep a decoder's first layers: a draft model for self-speculation, made of its own weights.

Before: `%x1 = layer 1 (%x0); ... %xn = layer n (%x(n-1)); %logits = head(norm(%xn))`.
After `keep_layers{count=k}`: `%logits = head(norm(%xk))`. Not equal: it drafts what the whole
program then checks (Zhang et al. 2023, "Draft & Verify"; Elhoushi et al. 2024, LayerSkip).

Where a layer ends is read from the data flow, not from names: between two attentions, the last
value through which every path from the token ids to the logits goes. The weights that stay are
the entries of the whole program itself, so the draft takes no memory of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.edit import Editor, same_shape, value_of
from ..ir.errors import PlanishError
from ..ir.program import Node, Program
from .contract import Context, Pass, contract

_ATTENTION = torch.ops.planish.attention.default


class CannotCutLayers(PlanishError):
    """The program has no layers, or not enough, that can be told apart in the data flow."""


@dataclass(frozen=True)
class KeepLayers(Pass):
    """Keep the first `count` layers, the final norm and the head."""

    count: int = 4

    contract = contract("lossy", requires=["raised"], changes_interface=True)

    def run(self, program: Program, context: Context) -> None:
        attentions = [node for node in program.graph.nodes if node.target is _ATTENTION]
        if not 0 < self.count < len(attentions):
            raise CannotCutLayers(
                f"{self.count} layers cannot be kept of {len(attentions)}",
                expected=f"a count from 1 to {len(attentions) - 1}",
                found=str(self.count),
                fix="choose fewer layers; a draft should be several times smaller than the model",
            )
        ends = layer_ends(program, attentions)
        if not context.journal.offers():
            return
        kept, last = ends[self.count], ends[-1]
        last.replace_all_uses_with(kept)
        _drop_caches(program, self.count)
        Editor(program).sweep()
        _drop_inputs(program, self.count)
        context.journal.noted(self.pass_name(), kept, f"{self.count} of {len(attentions)} layers")


def layer_ends(program: Program, attentions: Sequence[Node]) -> list[Node]:
    """The value before the first layer and the one after each, [batch, length, hidden].

    Raises CannotCutLayers.
    """
    narrow = _bottlenecks(program)
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    places: list[int] = []
    for attention in attentions:
        before = [i for i, node in enumerate(narrow) if order[node] < order[attention]]
        if not before or (places and before[-1] <= places[-1]):
            raise _not_separate(attention, "no single value leads from the layer before into it")
        places.append(before[-1])
    # The last layer is as long as the one before it, counted in such values.
    places.append(2 * places[-1] - places[-2])
    if places[-1] >= len(narrow):
        raise _not_separate(attentions[-1], "the layer has another form than the one before it")
    ends = [narrow[place] for place in places]
    for end, attention in zip(ends[1:], attentions, strict=True):
        if not same_shape(end, ends[0]) or value_of(end).dtype != value_of(ends[0]).dtype:
            raise _not_separate(attention, f"the layer ends in %{end.name}, of another shape")
    last = [node.target for node in narrow[places[-2] + 1 : places[-1] + 1]]
    if last != [node.target for node in narrow[places[-3] + 1 : places[-2] + 1]]:
        raise _not_separate(attentions[-1], "the layer has another form than the one before it")
    return ends


def _not_separate(attention: Node, why: str) -> CannotCutLayers:
    return CannotCutLayers(
        f"the layer of the attention %{attention.name} cannot be told apart: {why}",
        where=attention.meta.get("module", ""),
        expected="layers one after the other, each adding to one stream of values",
        fix="use another draft: a smaller model, or prompt lookup",
    )


def _bottlenecks(program: Program) -> list[Node]:
    """The values through which every path from the token ids to the first result goes, in order.

    Paths are those of tensors: what is computed from sizes alone (positions, masks) is none.
    """
    flow = _flow(program)
    place = {node: i for i, node in enumerate(flow)}
    found: list[Node] = []
    farthest = 0
    for node in flow:
        if farthest <= place[node]:  # no edge leads past this value
            found.append(node)
        readers = [place[user] for user in node.users if user in place]
        farthest = max([farthest, *readers])
    return found


def _flow(program: Program) -> list[Node]:
    """Every tensor that is computed from the first input and that the first result needs."""
    reached = {program.inputs[0]}
    for node in program.graph.nodes:
        is_tensor = isinstance(node.meta.get("val"), Tensor)
        if is_tensor and any(read in reached for read in node.all_input_nodes):
            reached.add(node)
    needed = {program.results[0]}
    for node in reversed(list(program.graph.nodes)):
        if node in needed and node in reached:
            needed.update(node.all_input_nodes)
    return [node for node in program.graph.nodes if node in reached and node in needed]


def _drop_caches(program: Program, count: int) -> None:
    """The keys and values that dropped layers returned."""
    if "cached" not in program.facts:
        return
    args, kwargs = pytree.tree_unflatten([0] * program.in_spec.num_leaves, program.in_spec)
    dropped = 2 * (len(kwargs["past"]) - count)
    kwargs = {**kwargs, "past": kwargs["past"][:count]}
    result, present = pytree.tree_unflatten([0] * program.out_spec.num_leaves, program.out_spec)
    program.in_spec = pytree.tree_structure((args, kwargs))
    program.out_spec = pytree.tree_structure((result, present[:count]))
    program.output.args = (program.results[:-dropped],)
    cache = program.metadata.get("cache")
    if isinstance(cache, dict) and "layers" in cache:
        program.metadata["cache"] = {**cache, "layers": cache["layers"][:count]}


def _drop_inputs(program: Program, count: int) -> None:
    """The inputs past_key_i and past_value_i of dropped layers, and their examples."""
    if "cached" not in program.facts:
        return
    kept: list[int] = []
    for place, node in enumerate(program.inputs):
        layer = re.fullmatch(r"past_(?:key|value)_(\d+)", node.name)
        if layer and int(layer[1]) >= count:
            program.graph.erase_node(node)
        else:
            kept.append(place)
    if program.examples:
        program.examples = tuple(program.examples[place] for place in kept)
