"""Fold a prefix into a decoder: constant keys and values that precede its cache.

Prefix tuning (Li & Liang 2021, sec. 4.2) and P-tuning v2 (Liu et al. 2022, sec. 3.2) train keys and
values for some virtual tokens in every layer. Before: a program with a KV cache. After: the same
inputs and outputs, and in every call the virtual tokens stand before the past. Equal to calling the
program with the prefix as its first past: only who passes it differs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..ir.edit import shape
from ..ir.errors import WrongOption
from ..ir.program import Node, Program
from ..ir.read_virtual_tokens import PREFIX, VirtualTokens, read_virtual_tokens
from .constant_past import CannotFold, past_inputs, precede
from .contract import Context, Pass, contract


@dataclass(frozen=True)
class FoldPrefix(Pass):
    """Fold the prefix of a PEFT folder (`adapter`) into constant keys and values."""

    adapter: str = ""

    contract = contract("bounded", requires=["cached"], changes_interface=True)

    def run(self, program: Program, context: Context) -> None:
        if not self.adapter:
            raise WrongOption(
                "fold_prefix was given no adapter",
                expected="adapter=FOLDER",
                fix="name the folder of a prefix-tuned adapter",
            )
        tokens = read_virtual_tokens(self.adapter, (PREFIX,))
        constants = keys_and_values(tokens, past_inputs(program))
        if context.journal.offers():
            joined = precede(program, constants, "prefix")
            note = f"{tokens.count} virtual tokens in {len(joined) // 2} layers"
            context.journal.noted(self.pass_name(), joined[0], note)


def keys_and_values(tokens: VirtualTokens, past: list[Node]) -> list[Tensor]:
    """[tokens, layers x 2 x kv_heads x head] as [1, kv_heads, tokens, head] for each past input.

    Raises CannotFold, with the sizes, for a prefix of another base.
    """
    _, heads, _, head = shape(past[0])
    width = len(past) * heads * head
    if tokens.values.shape[1] != width or any(shape(n)[1::2] != [heads, head] for n in past):
        raise CannotFold(
            "the prefix belongs to another base",
            expected=f"{len(past) // 2} layers x 2 x {heads} heads x {head} = {width} a token",
            found=str(tokens.values.shape[1]),
            fix="fold a prefix that was trained for this model",
        )
    parts = tokens.values.reshape(tokens.count, len(past), heads, head)
    return [parts[:, place].transpose(0, 1)[None].contiguous() for place in range(len(past))]
