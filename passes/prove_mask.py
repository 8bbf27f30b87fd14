"""Prove what a mask hides: causal, windowed, padding; by computing it at lengths of our choice.

The positional part of a mask depends on lengths alone. It is computed at several lengths (at both
sides of every constant in it) and must equal the causal or windowed formula in every element.
What depends on data stays a mask. A mask that fits no formula stays explicit, with a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import same_size
from ..ir.positional import Positional, Sizes
from ..ir.program import Node, Program
from .mask_choice import HIDES
from .mask_lengths import SHORT, MaskLengths, Problem
from .mask_parts import ABSORBS, Bias, MaskParts, Part, finite, split_additive
from .mask_positions import Form


@dataclass(frozen=True)
class Masking:
    """One thing done to the scores: `factor * node` is added, or, with a fill, scores are replaced.

    fill: the number written where the boolean node is false (true, when negated). space: the rank
    of the scores there (3 where batch and heads are one axis).
    """

    node: Node
    factor: float = 1.0
    fill: float | None = None
    negated: bool = False
    space: int = 4


@dataclass(frozen=True)
class Proof:
    """What the maskings of one attention amount to.

    explicit: why they stay one explicit mask, or "". fill: what hidden keys get where biases and
    parts become one additive mask. floor: the least that a masked score is let be.
    """

    causal: bool = False
    window: int = 0
    parts: tuple[Part, ...] = ()
    biases: tuple[Bias, ...] = ()
    fill: float = -float("inf")
    uniform: bool = False
    explicit: str = ""
    floor: float | None = None


class MaskProver:
    """Proofs for the masks of one program, each distinct mask once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.positional = Positional(program)
        self.lengths = MaskLengths(program, self.positional)
        self._proofs: dict[Any, Proof] = {}
        self._leaf_fills: dict[Node, set[float] | None] = {}
        self._numbers: dict[Node, float | None] = {}

    def prove(
        self,
        maskings: tuple[Masking, ...],
        queries: Any,
        keys: Any,
        sinks: bool,
        floor: float | None = None,
    ) -> Proof:
        """queries, keys: the lengths (int or SymInt). sinks: whether learned sinks join in.

        floor: the least that a masked score is let be.
        """
        key = (maskings, str(queries), str(keys), sinks, floor)
        if key not in self._proofs:
            proof = self._prove(maskings, queries, keys, sinks, floor)
            self._proofs[key] = replace(proof, floor=floor)
        return self._proofs[key]

    def number(self, value: Any) -> float | None:
        """The number that an argument is, also as a tensor of one known value; None if unknown."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, fx.Node):
            return None
        if value.target is torch.ops.aten.full.default:
            return self.number(value.args[1])
        if value not in self._numbers:
            self._numbers[value] = self._evaluated(value)
        return self._numbers[value]

    def _evaluated(self, node: Node) -> float | None:
        """The number that a value of one element is, if only weights of one element make it up."""
        if not self._is_single(node, 16):
            return None
        return float(self.positional.evaluate(node, {}, {}))

    def _is_single(self, node: Node, depth: int) -> bool:
        fake = node.meta.get("val")
        if not isinstance(fake, Tensor) or node not in self.positional.nodes or depth == 0:
            return False
        if fake.is_complex() or not all(isinstance(s, int) and s == 1 for s in fake.shape):
            return False
        return all(self._is_single(read, depth - 1) for read in node.all_input_nodes)

    def _prove(
        self,
        maskings: tuple[Masking, ...],
        queries: Any,
        keys: Any,
        sinks: bool,
        floor: float | None,
    ) -> Proof:
        whole = self._parts(maskings)
        if floor is not None:
            whole.raise_to(floor)
        data = [p for p in whole.parts if p.node not in self.positional.nodes]
        form = Form()
        if len(data) != len(whole.parts):
            form = self._form(maskings, whole, data, queries, keys)
        if form.fault:
            return Proof(explicit=form.fault)
        proof = Proof(form.causal, form.window, tuple(data), tuple(whole.biases))
        hides = form.causal or form.window > 0
        may_be_blind = bool(data) or (hides and not same_size(queries, keys))
        if floor is not None and proof.biases:
            may_be_blind = True  # a bias can hide as well
        return self._filled(proof, whole, bool(may_be_blind), sinks)

    def _parts(self, maskings: tuple[Masking, ...]) -> MaskParts:
        whole = MaskParts()
        for masking in maskings:
            found = MaskParts()
            if masking.fill is None:
                found = split_additive(masking.node, masking.factor, self.number, self._hidden_at)
                found.parts = [replace(p, space=masking.space) for p in found.parts]
                found.biases = [replace(b, space=masking.space) for b in found.biases]
                whole.add(found)
            else:
                found.hide(masking.node, masking.negated, masking.fill, self.number)
                whole.parts += [replace(p, space=masking.space) for p in found.parts]
                whole.fills |= found.fills
        return whole

    def _filled(self, proof: Proof, whole: MaskParts, may_be_blind: bool, sinks: bool) -> Proof:
        """Settle what a query that sees no key does."""
        fills = whole.fills
        fill = min(fills, default=-float("inf"))
        if not may_be_blind or sinks or not any(finite(f) for f in fills):
            return replace(proof, fill=fill)
        if len(fills) > 1 or whole.summed:
            reason = "several finite fills add up where a query sees no key"
            return Proof(explicit=reason)
        if fill > ABSORBS:
            reason = f"its fill {fill:g} does not outweigh the scores where a query sees no key"
            return Proof(explicit=reason)
        return replace(proof, fill=fill, uniform=True)

    def _hidden_at(self, node: Node) -> set[float] | None:
        if node not in self.positional.nodes:
            return None
        if node not in self._leaf_fills:
            self._leaf_fills[node] = self._leaf(node)
        return self._leaf_fills[node]

    def _leaf(self, node: Node) -> set[float] | None:
        for sizes in self.lengths.sizes([SHORT[-1]]):
            try:
                value = self.positional.evaluate(node, sizes, {})
            except (RuntimeError, IndexError, LookupError):
                continue
            if bool(((value == 0) | (value <= HIDES)).all()):
                return {float(v) for v in value.unique() if v != 0}
        return None

    def _form(
        self,
        maskings: tuple[Masking, ...],
        whole: MaskParts,
        data: list[Part],
        queries: Any,
        keys: Any,
    ) -> Form:
        """What the positional part is; what depends on data lets all keys through meanwhile."""
        known = {p.node: (not p.negated) for p in data} | {b.node: 0 for b in whole.biases}

        def evaluate(sizes: Sizes, given: dict[Node, Any], form: tuple[int, int]) -> Tensor:
            return self._visible(maskings, sizes, given, form)

        roots = tuple(m.node for m in maskings)
        return self.lengths.form(Problem(roots, known, queries, keys, evaluate))

    def _visible(
        self,
        maskings: tuple[Masking, ...],
        sizes: Sizes,
        given: dict[Node, Any],
        form: tuple[int, int],
    ) -> Tensor:
        """[queries, keys]: what the positional parts let through; ValueError if they also bias."""
        visible = torch.ones(form, dtype=torch.bool)
        for masking in maskings:
            value: Tensor = self.positional.evaluate(masking.node, sizes, given)
            if masking.fill is not None:
                value = ~value if masking.negated else value
            else:
                shown = value == 0
                if not bool((shown | (value * masking.factor <= HIDES)).all()):
                    raise ValueError("it neither hides a key nor leaves its score as it is")
                value = shown
            value = value.reshape(-1, *value.shape[-2:]) if value.dim() > 2 else value[None]
            if not bool((value == value[:1]).all()):
                raise ValueError("it differs between heads or examples")
            visible = visible & value[0]
        return visible
