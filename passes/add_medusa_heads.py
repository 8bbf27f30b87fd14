"""Graft Medusa heads onto a decoder: from one hidden state, guesses of the tokens to come.

Before: `%logits = linear(%h, %head)`. After: besides, for each head k,
`%g(k) = linear(%h + silu(linear(%h, %w(k), %b(k))), %head(k))`, returned together as
[batch, length, heads, vocabulary]. Row i of the logits tells token i + 1, head k tells token
i + 2 + k (Cai et al. 2024, "Medusa", sec. 2.1.1). The logits are what they were, to the bit.

Heads come from a safetensors file under the names of the paper's own code,
`{k}.{block}.linear.weight` [hidden, hidden], `{k}.{block}.linear.bias` [hidden] and
`{k}.{last}.weight` [vocabulary, hidden]; without the last, a head shares the decoder's. Without
a file they start as the paper starts them: blocks of zeros, so that each repeats the decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..ir.edit import Editor, value_of
from ..ir.errors import PlanishError
from ..ir.pattern import bound_arguments
from ..ir.program import Node, Program
from ..ir.read_safetensors import read_safetensors
from .contract import Context, Pass, contract

_ATEN = torch.ops.aten
_PREFIX = "medusa_head"


class CannotGraft(PlanishError):
    """The program has no head of its own to build on, or the heads do not fit it."""


@dataclass(frozen=True)
class AddMedusaHeads(Pass):
    """Add `heads` heads, or those of the safetensors file `path`."""

    heads: int = 3
    path: str = ""

    contract = contract("exact", requires=["functional"], changes_interface=True)

    def run(self, program: Program, context: Context) -> None:
        head = language_head(program)
        if not context.journal.offers():
            return
        hidden = bound_arguments(head)["input"]
        stored = self._stored(value_of(hidden).shape[-1], value_of(head).dtype)
        grafted = graft(program, head, stored)
        context.journal.noted(self.pass_name(), grafted, f"{len(heads_of(stored))} heads")

    def _stored(self, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.path:
            found = read_safetensors(self.path)
            return {name.removeprefix(f"{_PREFIX}."): value for name, value in found.items()}
        return empty_heads(self.heads, width, dtype)


def empty_heads(count: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of heads that repeat the decoder's own: one block of zeros each."""
    stored: dict[str, Tensor] = {}
    for k in range(count):
        stored[f"{k}.0.linear.weight"] = torch.zeros(width, width, dtype=dtype)
        stored[f"{k}.0.linear.bias"] = torch.zeros(width, dtype=dtype)
    return stored


def language_head(program: Program) -> Node:
    """The linear that makes the logits; after it only pointwise operations. Raises CannotGraft."""
    node = program.results[0]
    while node.target is not _ATEN.linear.default:
        target = node.target
        pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        sources = [n for n in node.all_input_nodes if n.op == "call_function"]
        if not (pointwise or target is _ATEN._to_copy.default) or len(sources) != 1:
            raise CannotGraft(
                f"the logits are not made by a linear head: %{node.name} is {target}",
                where=node.meta.get("module", ""),
                expected="linear(hidden states, weight), then only pointwise operations",
                found=str(target),
                fix="leave add_medusa_heads out for this model",
            )
        node = sources[0]
    return node


def heads_of(stored: Mapping[str, Tensor]) -> list[list[str]]:
    """For each head the names of its parts in the order in which they are applied."""
    parts: dict[int, dict[int, str]] = {}
    for name in stored:
        found = re.fullmatch(r"(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)", name)
        if found is None:
            raise CannotGraft(
                f"{name} is no part of a Medusa head",
                expected="{head}.{block}.linear.weight, .linear.bias or {head}.{last}.weight",
                found=name,
                fix="check that this is a file of Medusa heads",
            )
        if found[3] != "linear.bias":
            parts.setdefault(int(found[1]), {})[int(found[2])] = name
    if sorted(parts) != list(range(len(parts))) or not parts:
        raise CannotGraft("heads are missing", expected="0, 1, ...", found=str(sorted(parts)))
    return [[parts[k][block] for block in sorted(parts[k])] for k in range(len(parts))]


def graft(program: Program, head: Node, stored: Mapping[str, Tensor]) -> Node:
    """Emit the heads and return them as the result after the logits; raises CannotGraft."""
    parts = heads_of(stored)
    _check_shapes(head, stored)
    editor = Editor(program)
    arguments = bound_arguments(head)
    weights = {n: editor.weight(f"{_PREFIX}.{n}", value) for n, value in stored.items()}
    with editor.at(program.output, head.meta.get("module", "")):
        made = [_head(editor, arguments, names, weights) for names in parts]
        result = editor.emit(_ATEN.stack.default, made, 2)
    _extend_results(program, result)
    program.metadata["medusa_heads"] = len(made)
    return result


def _head(
    editor: Editor, head: Mapping[str, Node], names: list[str], weights: Mapping[str, Node]
) -> Node:
    hidden, last, bias = head["input"], head["weight"], head["bias"]
    for name in names:
        if not name.endswith("linear.weight"):
            last, bias = weights[name], None
            continue
        offset = weights.get(name.removesuffix("weight") + "bias")
        turned = editor.emit(_ATEN.linear.default, hidden, weights[name], offset)
        turned = editor.emit(_ATEN.silu.default, turned)
        hidden = editor.emit(_ATEN.add.Tensor, hidden, turned)
    return editor.emit(_ATEN.linear.default, hidden, last, bias)


def _check_shapes(head: Node, stored: Mapping[str, Tensor]) -> None:
    vocabulary, width = value_of(bound_arguments(head)["weight"]).shape
    dtype = value_of(head).dtype
    for name, value in stored.items():
        wanted = [vocabulary, width]
        if ".linear." in name:
            wanted = [width, width] if name.endswith("weight") else [width]
        if list(value.shape) != wanted or value.dtype != dtype:
            raise CannotGraft(
                f"{name} does not fit the decoder",
                expected=f"{dtype} {wanted}",
                found=f"{value.dtype} {list(value.shape)}",
                fix="use heads that were made for this model, in its dtype",
            )


def _extend_results(program: Program, result: Node) -> None:
    """(result, heads), or ((result, heads), present) with a KV cache; flat: after the result."""
    old = pytree.tree_unflatten([0] * program.out_spec.num_leaves, program.out_spec)
    cached = "cached" in program.facts
    inner = pytree.tree_structure(old[0] if cached else old).num_leaves
    spec = ((old[0], 0), old[1]) if cached else (old, 0)
    program.out_spec = pytree.tree_structure(spec)
    results = program.results
    program.output.args = ([*results[:inner], result, *results[inner:]],)
