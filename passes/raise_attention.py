"""Raise attention: every spelling of it becomes one operation.

Before, in one of many forms: `%s = matmul(%q, transpose(repeat(%k))); %m = add(mul(%s, 0.25),
where(le(positions, positions) and padding, 0, lowest)); %o = matmul(softmax(%m), repeat(%v))`.
After: `%o = attention(%q, %k, %v, %padding, scale=0.25, causal=True, uniform_if_blind=True)`.

Equal because it is the same formula (Vaswani et al. 2017, eq. 1): all scales are multiplied into
one, grouped heads (Ainslie et al. 2023) are read as they are stored, and a mask is replaced by
`causal` and `window` only where its values, computed at several lengths, are that formula in every
element; what depends on data stays a mask. A query that sees no key (left padding) keeps its
meaning: boolean masks and minus infinity give zeros; the lowest finite number, which absorbs the
score, gives the mean of all values (`uniform_if_blind`). Where neither describes the original, the
mask stays explicit and the rewrite's note says why. A softmax that would give NaN there (minus
infinity in every element, outside of the composite call) gives zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..ir.edit import Editor, same_size, shape
from ..ir.program import Node, Program
from ..ir.rewrite import Decline, Match, Rule, apply_rules
from .attention_forms import SDPA, SOFTMAXES, Attention, read_sdpa, read_softmax
from .attention_scores import Unreadable
from .contract import Context, Pass, contract
from .emit_mask import Form, MaskEmitter
from .mask_parts import Part
from .prove_mask import MaskProver, Proof

aten = torch.ops.aten


class AttentionRule(Rule):
    """Looks at composite calls and at softmaxes that weigh values."""

    name = kind = "attention"

    def __init__(self, program: Program) -> None:
        self.prover = MaskProver(program)
        self.masks: MaskEmitter | None = None

    def look(self, node: Node) -> Match | Decline | None:
        try:
            found = self._read(node)
        except Unreadable as reason:
            return Decline(str(reason))
        if found is None:
            return None
        queries, keys = found.q.sizes[2], found.k.sizes[2]
        sinks = found.sinks is not None
        proof = self.prover.prove(found.maskings, queries, keys, sinks, found.floor)
        return Match(found.root, {"attention": found, "proof": proof}, note=_note(proof))

    def _read(self, node: Node) -> Attention | None:
        if node.target is SDPA:
            return read_sdpa(node, self.prover.number)
        if node.target in SOFTMAXES:
            return read_softmax(node, self.prover.number)
        return None

    def build(self, found: Match, editor: Editor) -> Node | dict[Node, Node]:
        if self.masks is None or self.masks.editor is not editor:
            self.masks = MaskEmitter(editor)
        attention: Attention = found.found["attention"]
        result = self._attention(attention, found.found["proof"], editor, self.masks)
        return _in_place(attention, result, editor)

    def _attention(
        self, found: Attention, proof: Proof, editor: Editor, masks: MaskEmitter
    ) -> Node:
        q, k, v = (x.emit(editor) for x in (found.q, found.k, found.v))
        for factor, divides in found.factors:
            q = editor.emit(aten.div.Tensor if divides else aten.mul.Tensor, q, factor)
        mask = masks.mask(proof, found.maskings, Form(q, found.q.sizes[1], found.single))
        options: dict[str, Any] = {"scale": found.scale}
        if proof.causal or found.causal:
            options["causal"] = True
        if proof.window:
            options["window"] = proof.window
        if found.softcap:
            options["softcap"] = found.softcap
        if proof.uniform:
            options["uniform_if_blind"] = True
        extra = [mask, found.sinks] if found.sinks is not None else [mask] if mask else []
        return editor.emit(torch.ops.planish.attention.default, q, k, v, *extra, **options)


def _note(proof: Proof) -> str:
    """What an attention keeps that has both axes, queries and keys."""
    if proof.explicit:
        return f"keeps an explicit mask: {proof.explicit}"
    if any(_is_square(_sizes(part)) for part in proof.parts):
        return "keeps a mask of queries by keys: it depends on the inputs"
    if any(_is_square(shape(bias.node)) for bias in proof.biases):
        return "keeps a bias of queries by keys"
    return ""


def _sizes(part: Part) -> list[Any]:
    """The sizes of a part as the mask reads it."""
    sizes = shape(part.node)
    for wrap in part.wraps:
        if wrap.target is aten.unsqueeze.default:
            axis = int(wrap.args[1])  # type: ignore[arg-type]
            sizes.insert(axis if axis >= 0 else axis + len(sizes) + 1, 1)
    return sizes


def _is_square(sizes: list[Any]) -> bool:
    return len(sizes) > 1 and sizes[-2] != 1 and sizes[-1] != 1


def _in_place(found: Attention, result: Node, editor: Editor) -> dict[Node, Node]:
    """The result in the form that the old one had."""
    if found.order:
        return {found.root: editor.emit(aten.permute.default, result, list(found.order))}
    if found.single:
        return {found.root: editor.emit(aten.squeeze.dim, result, 1)}
    if not found.joined:
        return {found.root: result}
    sizes = shape(result)
    parted = [
        reader
        for reader in found.root.users
        if reader.target is aten.reshape.default
        and len(shape(reader)) == 4
        and all(same_size(x, y) for x, y in zip(shape(reader), sizes, strict=True))
    ]
    if len(parted) == len(found.root.users):
        return dict.fromkeys(parted, result)
    return {found.root: editor.emit(aten.flatten.using_ints, result, 0, 1)}


@dataclass(frozen=True)
class RaiseAttention(Pass):
    """Read attention in any spelling as one operation, its mask proven or explicit."""

    contract = contract("bounded", requires=["functional", "canonical"], ensures=["raised"])

    def run(self, program: Program, context: Context) -> None:
        apply_rules(program, [AttentionRule(program)], context.journal)
