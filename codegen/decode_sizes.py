"""The sizes of a cached program, for one text: what depends on the call, and what caches hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from ..ir.errors import PlanishError
from ..ir.program import Program
from .decode_native import Shape
from .decode_plan import Size

PAST = re.compile(r"past_(key|value)_(\d+)")


class CannotDecode(PlanishError):
    """A program that has no decoding plan."""


@dataclass(frozen=True)
class Layer:
    """Sizes of one attention's cache."""

    kv_heads: int
    head: int
    value_head: int


def layers_of(program: Program) -> list[Layer]:
    """The caches of a program, in order; raises CannotDecode if it has none."""
    found: dict[tuple[str, int], list[Any]] = {}
    for node in program.inputs:
        if match := PAST.fullmatch(node.name):
            found[match[1], int(match[2])] = list(node.meta["val"].shape)
    if not found:
        raise CannotDecode(
            "the program has no KV cache",
            expected="inputs past_key_0, past_value_0, ...",
            found=", ".join(node.name for node in program.inputs),
            fix="run the pass insert_kv_cache, or optimize with kv_cache=True",
        )
    count = len(found) // 2
    return [
        Layer(found["key", i][1], found["key", i][3], found["value", i][3]) for i in range(count)
    ]


@dataclass(frozen=True)
class Symbols:
    """The names of the free sizes: the new tokens, the batch (one text), the past tokens."""

    tokens: sympy.Symbol
    batch: tuple[sympy.Symbol, ...]
    past: tuple[sympy.Symbol, ...]

    def shape(self, value: Tensor) -> Shape:
        """Sizes with None for the tokens; () where a size depends on the call in another way."""
        sizes = [self.plain(size) for size in value.shape]
        tokens = self.tokens
        if any(not isinstance(size, int) and size != tokens for size in sizes):
            return ()
        return tuple(size if isinstance(size, int) else None for size in sizes)

    def plain(self, size: Any) -> Any:
        """An int, or an expression of the call's symbols; the text's batch is one."""
        if isinstance(size, int):
            return size
        expression = size.node.expr.xreplace(dict.fromkeys(self.batch, sympy.S.One))
        return int(expression) if expression.is_number else expression

    def size(self, value: Any) -> int | Size:
        plain = self.plain(value)
        if isinstance(plain, int):
            return plain
        tokens, past = self.tokens, self.past
        extra = plain.free_symbols - {tokens, *past}
        if extra:
            raise CannotDecode(
                f"a size {plain} depends on more than the number of tokens and of past ones",
                expected=f"{tokens} and {', '.join(map(str, past))}",
                found=", ".join(map(str, extra)),
                fix="use the reference interpreter for this program",
            )
        if plain == tokens:
            return Size(_tokens_alone, False)
        plain = plain.xreplace(dict.fromkeys(past, past[0]))
        of = sympy.lambdify([tokens, past[0]], plain, modules=["math"])
        return Size(lambda t, p: int(of(t, p)), bool(plain.free_symbols & {past[0]}))


def symbols_of(program: Program) -> Symbols:
    """The names of the free sizes; raises CannotDecode for inputs that a text does not have."""
    ids = [node for node in program.inputs if not PAST.fullmatch(node.name)]
    value = ids[0].meta.get("val") if ids else None
    if len(ids) != 1 or not isinstance(value, Tensor) or value.dim() != 2:
        raise CannotDecode(
            "a decoder takes token ids [batch, tokens] and its cache, nothing else",
            expected="one input besides past",
            found=", ".join(node.name for node in ids),
            fix="capture the model from input_ids alone, then insert the cache",
        )
    past: list[Any] = [n.meta["val"].shape[2] for n in program.inputs if PAST.fullmatch(n.name)]
    rows, tokens = (
        size.node.expr if isinstance(size, torch.SymInt) else size for size in value.shape
    )
    if isinstance(tokens, int):
        raise CannotDecode(
            "the number of tokens is fixed", expected="a free size", found=str(tokens)
        )
    kept = dict.fromkeys(size.node.expr for size in past)
    return Symbols(tokens, () if isinstance(rows, int) else (rows,), tuple(kept))


def most_rows(program: Program) -> int | None:
    """How many tokens' logits one call gives at most; None where it gives all."""
    size, many = program.results[0].meta["val"].shape[1], 1 << 20
    if not isinstance(size, int):
        size = size.node.expr.xreplace({symbols_of(program).tokens: sympy.Integer(many)})
    return None if size == many else int(size)


def _tokens_alone(tokens: int, past: int) -> int:
    return tokens
