"""Prove what a mask hides: causal, windowed, padding; by computing it at lengths of our choice.

The positional part of a mask depends on lengths alone. It is computed at several lengths (at both
sides of every constant in it) and must equal the causal or windowed formula in every element.
What depends on data stays a mask. A mask that fits no formula stays explicit, with a sentence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ..ir.edit import same_size
from ..ir.positional import Positional, blank, free_sizes, free_symbols, is_size, size_at
from ..ir.program import Node, Program
from .mask_parts import ABSORBS, HIDES, Bias, MaskParts, Part, finite, split_additive

_SHORT = (2, 3, 5, 8, 13)
_LONGEST = 8192
"""The greatest constant in a mask (a window) around which masks are still computed whole."""
_COMPARES = frozenset({"lt", "le", "gt", "ge", "eq", "ne"})
_MOVES = frozenset({"add", "sub", "rsub", "mul", "div", "floor_divide", "remainder"})
_CUTS = frozenset({"clamp", "clamp_min", "clamp_max", "triu", "tril"})


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
    parts become one additive mask.
    """

    causal: bool = False
    window: int = 0
    parts: tuple[Part, ...] = ()
    biases: tuple[Bias, ...] = ()
    fill: float = -float("inf")
    uniform: bool = False
    explicit: str = ""


class MaskProver:
    """Proofs for the masks of one program, each distinct mask once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.positional = Positional(program)
        self.free = free_sizes(program)
        self._proofs: dict[Any, Proof] = {}
        self._leaf_fills: dict[Node, set[float] | None] = {}

    def prove(self, maskings: tuple[Masking, ...], queries: Any, keys: Any, sinks: bool) -> Proof:
        """queries, keys: the lengths (int or SymInt). sinks: whether learned sinks join in."""
        key = (maskings, str(queries), str(keys), sinks)
        if key not in self._proofs:
            self._proofs[key] = self._prove(maskings, queries, keys, sinks)
        return self._proofs[key]

    def number(self, value: Any) -> float | None:
        """The number that an argument is, also as a tensor of one known value; None if unknown."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, fx.Node):
            return None
        if value.target is torch.ops.aten.full.default:
            return self.number(value.args[1])
        fake = value.meta.get("val")
        if value.op == "get_attr" and isinstance(fake, Tensor) and fake.numel() == 1:
            return float(self.program.weights[str(value.target)].item())
        return None

    def _prove(self, maskings: tuple[Masking, ...], queries: Any, keys: Any, sinks: bool) -> Proof:
        whole = self._parts(maskings)
        data = [p for p in whole.parts if p.node not in self.positional.nodes]
        causal, window, reason = False, 0, ""
        if len(data) != len(whole.parts):
            causal, window, reason = self._positions(maskings, whole, data, queries, keys)
        if reason:
            return Proof(explicit=reason)
        proof = Proof(causal, window, tuple(data), tuple(whole.biases))
        may_be_blind = bool(data) or ((causal or window) and not same_size(queries, keys))
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
                found.hide(masking.node, masking.negated, masking.fill)
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
        for sizes in self._sizes([_SHORT[-1]]):
            try:
                value = self.positional.evaluate(node, sizes, {})
            except (RuntimeError, IndexError, LookupError):
                continue
            if bool(((value == 0) | (value <= HIDES)).all()):
                return {float(v) for v in value.unique() if v != 0}
        return None

    def _sizes(
        self, lengths: Iterable[int], moving: frozenset[Any] = frozenset()
    ) -> Iterator[dict[Any, int]]:
        """Sizes for every free symbol: lengths that differ, in both orders; small batches.

        moving: symbols that are lengths, whatever they are in the inputs.
        """
        for turn, length in enumerate(lengths):
            symbols = sorted(self.free, key=str, reverse=bool(turn % 2))
            sizes: dict[Any, int] = {}
            for place, symbol in enumerate(symbols):
                least, greatest, positions = self.free[symbol]
                wanted = length + 3 * place if positions or symbol in moving else 2
                sizes[symbol] = min(max(wanted, least), greatest)
            yield sizes

    def _positions(
        self,
        maskings: tuple[Masking, ...],
        whole: MaskParts,
        data: list[Part],
        queries: Any,
        keys: Any,
    ) -> tuple[bool, int, str]:
        """(causal, window, ""), or the sentence why it is neither."""
        known = {p.node: (not p.negated) for p in data} | {b.node: 0 for b in whole.biases}
        fixed = isinstance(queries, int) and isinstance(keys, int)
        bound = 0 if fixed else self._greatest_constant(maskings, set(known))
        if bound > _LONGEST:
            return False, 0, f"its constant {bound} is too long to try lengths around it"
        around = [bound - 1, bound, bound + 1] + ([2 * bound + 3] if bound <= 2048 else [])
        lengths = sorted({*_SHORT, *(n for n in around if bound and n > 1)})
        moving = frozenset(symbol for size in (queries, keys) for symbol in free_symbols(size))
        seen: dict[tuple[int, int], Tensor] = {}
        for sizes in self._sizes(lengths, moving):
            form = (size_at(queries, sizes), size_at(keys, sizes))
            try:
                seen[form] = self._visible(maskings, known, sizes, form)
            except (RuntimeError, IndexError, LookupError):
                continue
            except ValueError as error:
                return False, 0, str(error)
        if len(seen) < (1 if fixed else 4):
            return False, 0, "it cannot be computed at four lengths"
        return recognize(list(seen.values()))

    def _visible(
        self,
        maskings: tuple[Masking, ...],
        known: dict[Node, Any],
        sizes: dict[Any, int],
        form: tuple[int, int],
    ) -> Tensor:
        """[queries, keys]: what the positional parts let through; ValueError if they also bias."""
        given: dict[Node, Any] = {n: blank(n, sizes, value) for n, value in known.items()}
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

    def _greatest_constant(self, maskings: tuple[Masking, ...], known: set[Node]) -> int:
        """The greatest number that positions are compared or moved with."""
        greatest, todo, seen = 0, [m.node for m in maskings], set[Node](known)
        while todo:
            node = todo.pop()
            if node in seen or is_size(node.meta.get("val")):
                continue
            seen.add(node)
            name = getattr(getattr(node.target, "_schema", None), "name", "").split("::")[-1]
            if name in _COMPARES | _MOVES | _CUTS and not _floating(node):
                numbers = [abs(a) for a in node.args if isinstance(a, (int, float))]
                greatest = max([greatest, *(int(n) for n in numbers)])
            todo += node.all_input_nodes
        return greatest


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def formula(queries: int, keys: int, causal: bool, window: int) -> Tensor:
    """[queries, keys], True where query i sees key j; the last query sits at the last key."""
    last = torch.arange(queries)[:, None] + (keys - queries)
    key = torch.arange(keys)[None, :]
    visible = key <= last if causal else torch.ones(queries, keys, dtype=torch.bool)
    return visible & (key > last - window) if window else visible


def recognize(seen: list[Tensor]) -> tuple[bool, int, str]:
    """(causal, window, "") of masks [queries, keys] at several lengths, or the sentence why not."""
    widest = max(seen, key=lambda mask: mask.numel())
    window = int(widest[-1].sum())
    guesses = [(False, 0), (True, 0)]
    guesses += [(True, window), (False, window)] if window > 0 else []
    for causal, width in guesses:
        if all(torch.equal(m, formula(len(m), m.shape[1], causal, width)) for m in seen):
            return causal, width, ""
    return False, 0, _difference(sorted(seen, key=lambda mask: mask.numel()))


def _difference(seen: list[Tensor]) -> str:
    """Where the shortest mask that is not causal differs from a causal one."""
    reason = "its positional part is neither causal nor a window"
    for mask in seen:
        queries, keys = mask.shape
        wrong = (mask != formula(queries, keys, True, 0)).nonzero().tolist()
        if wrong:
            i, j = wrong[0]
            sees = "sees" if bool(mask[i, j]) else "does not see"
            return f"{reason}: query {i} of {queries} {sees} key {j} of {keys}"
    return reason
