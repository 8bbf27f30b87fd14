"""Integer arithmetic, logic and shifts (PTX ISA 9.7.1 and 9.7.8), of predicates too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_parse import Instruction
from .ptx_registers import numpy_type
from .ptx_state import Builder, Handler, Mask, State, assign, known, typed

Array = NDArray[Any]


def elementwise(function: Callable[..., Any], *allowed: str) -> Builder:
    """An instruction that is a numpy ufunc of its operands, all of one type."""

    def build(state: State, instruction: Instruction, site: int) -> Handler:
        del site
        known(instruction, *allowed)
        dtype = numpy_type(instruction.type)
        target = state.registers.target(instruction.operands[0], dtype)
        sources = typed(state, instruction, instruction.type)
        if instruction.type in ("s16x2", "u16x2"):
            half = np.int16 if instruction.type == "s16x2" else np.uint16
            target, sources = target.view(half), [source.view(half) for source in sources]
            return lambda mask: function(*sources, out=target, where=pairs(mask))
        if target.dtype != dtype:
            return assign(target, lambda: function(*sources))
        return lambda mask: function(*sources, out=target, where=mask)

    return build


def pairs(mask: Mask) -> Mask:
    """A mask of threads to one of their packed halves."""
    return mask if mask is True else np.repeat(mask, 2)


def computed(function: Callable[..., Array], *allowed: str) -> Builder:
    """An instruction whose result, of the operands' type, is a function of its operands."""

    def build(state: State, instruction: Instruction, site: int) -> Handler:
        del site
        known(instruction, *allowed)
        target = state.registers.target(instruction.operands[0], numpy_type(instruction.type))
        sources = typed(state, instruction, instruction.type)
        return assign(target, lambda: function(*sources))

    return build


def _product(state: State, instruction: Instruction, site: int) -> Handler:
    """mul and mad: .lo, .hi, .wide."""
    del site
    part = (known(instruction, "lo", "hi", "wide") or {"lo"}).pop()
    dtype = np.dtype(numpy_type(instruction.type))
    a, b, *rest = instruction.operands[1:]
    x, y = (state.registers.source(operand, dtype.type) for operand in (a, b))
    result = dtype
    if part == "wide":
        result = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
    target = state.registers.target(instruction.operands[0], result.type)
    addend = state.registers.source(rest[0], result.type) if rest else None
    if part == "lo" and addend is None:
        return lambda mask: np.multiply(x, y, out=target, where=mask)

    def compute() -> Array:
        value = high_product(x, y) if part == "hi" else np.multiply(x, y, dtype=result)
        return value if addend is None else value + addend

    return assign(target, compute)


def high_product(x: Array, y: Array) -> Array:
    """The upper half of the products of 16, 32 or 64-bit integers."""
    bits = x.itemsize * 8
    if bits < 64:
        wide = np.dtype(f"{x.dtype.kind}{2 * x.itemsize}")
        return (np.multiply(x, y, dtype=wide) >> wide.type(bits)).astype(x.dtype)
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a, b = x.astype(np.uint64), y.astype(np.uint64)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> half) + (other >> half)
    if x.dtype.kind == "i":
        high = high - np.where(x < 0, b, np.uint64(0)) - np.where(y < 0, a, np.uint64(0))
    return high.astype(x.dtype)


def _quotient(x: Array, y: Array) -> Array:
    """Division toward zero; by zero gives all ones, as the GPU does in practice."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    rest = np.fmod(x, safe)
    ones = -1 if y.dtype.kind == "i" else np.iinfo(y.dtype).max
    return np.where(y == 0, y.dtype.type(ones), (x - rest) // safe)


def _remainder(x: Array, y: Array) -> Array:
    return np.where(y == 0, x, np.fmod(x, np.where(y == 0, y.dtype.type(1), y)))


def _shift(left: bool) -> Builder:
    """shl, shr: amounts are unsigned 32 bits and clamped to the width."""

    def build(state: State, instruction: Instruction, site: int) -> Handler:
        del site
        known(instruction)
        name, a, b = instruction.operands
        dtype = np.dtype(numpy_type(instruction.type))
        target = state.registers.target(name, dtype.type)
        x = state.registers.source(a, dtype.type)
        amount = state.registers.source(b, np.uint32)
        width = dtype.itemsize * 8
        function = np.left_shift if left else np.right_shift
        if not b.startswith("%") and amount[0] < width:
            fixed = amount.astype(dtype)
            return lambda mask: function(x, fixed, out=target, where=mask)
        arithmetic = not left and dtype.kind == "i"

        def compute() -> Array:
            capped = np.minimum(amount, np.uint32(width - 1)).astype(dtype)
            moved = function(x, capped)
            return moved if arithmetic else np.where(amount < width, moved, dtype.type(0))

        return assign(target, compute)

    return build


INTEGER: Mapping[str, Builder] = {
    "add": elementwise(np.add),
    "sub": elementwise(np.subtract),
    "mul": _product,
    "mad": _product,
    "div": computed(_quotient),
    "rem": computed(_remainder),
    "min": elementwise(np.minimum),
    "max": elementwise(np.maximum),
    "abs": elementwise(np.absolute),
    "neg": elementwise(np.negative),
    "and": elementwise(np.bitwise_and),
    "or": elementwise(np.bitwise_or),
    "xor": elementwise(np.bitwise_xor),
    "not": elementwise(np.bitwise_not),
    "cnot": computed(lambda x: (x == 0).astype(x.dtype)),
    "sad": computed(lambda x, y, z: np.where(x < y, y - x, x - y) + z),
    "shl": _shift(True),
    "shr": _shift(False),
}
"""Builders by the first word of the opcode, for operands that are integers, bits or predicates."""
