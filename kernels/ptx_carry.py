"""Arithmetic with a carry: add.cc, addc, sub.cc, subc, mad.lo.cc, madc (PTX ISA 9.7.2)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_integer import high_product
from .ptx_parse import Instruction
from .ptx_registers import numpy_type
from .ptx_state import Handler, Mask, State, known, typed

Array = NDArray[Any]


def carries(instruction: Instruction) -> bool:
    """Whether the instruction reads or writes the carry."""
    return "cc" in instruction.words or instruction.words[0] in ("addc", "subc", "madc")


def carry(state: State, instruction: Instruction, site: int) -> Handler:
    """Builder of all of them; the carry is a flag of each thread (of sub: the borrow)."""
    del site
    modifiers = known(instruction, "cc", "lo", "hi")
    kind = "u" + instruction.type[1:]
    dtype = numpy_type(kind)
    target = state.registers.target(instruction.operands[0], dtype)
    operands = typed(state, instruction, kind)
    flag: Array = state.part.setdefault("carry", np.zeros(state.threads, bool))
    word = instruction.words[0]
    takes, gives = word.endswith("c"), "cc" in modifiers

    def run(mask: Mask) -> None:
        first, last = operands[0], operands[-1]
        if word.startswith("mad"):
            first = high_product(first, operands[1]) if "hi" in modifiers else first * operands[1]
        one = flag.astype(dtype) if takes else np.zeros(state.threads, dtype)
        if word.startswith("sub"):
            result = first - last - one
            out = (first < last) | ((first == last) & (one != 0))
        else:
            part = first + last
            result = part + one
            out = (part < first) | (result < part)
        np.copyto(target, result, where=mask)
        if gives:
            np.copyto(flag, out, where=mask)

    return run
