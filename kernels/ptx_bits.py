"""Bit fields, byte permutations, truth tables, bit counts, byte dot products (PTX ISA 9.7.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, UnsupportedInstruction
from .ptx_parse import Instruction
from .ptx_registers import numpy_type
from .ptx_state import Builder, Handler, State, assign, known, typed

Array = NDArray[Any]


def _funnel(state: State, instruction: Instruction, site: int) -> Handler:
    """shf.l, shf.r: the two words shifted as one."""
    del site
    modifiers = known(instruction, "l", "r", "wrap", "clamp")
    low, high, amount = typed(state, instruction, "u32")
    target = state.registers.target(instruction.operands[0], np.uint32)
    wrap, left = "wrap" in modifiers, "l" in modifiers

    def compute() -> Array:
        n = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype("u8")
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        moved = (both << n) >> np.uint64(32) if left else both >> n
        return moved.astype(np.uint32)

    return assign(target, compute)


def _field(state: State, instruction: Instruction, site: int) -> Handler:
    """bfe: a bit field, extended by its sign where the type has one."""
    del site
    known(instruction)
    dtype = np.dtype(numpy_type(instruction.type))
    name, a, b, c = instruction.operands
    target = state.registers.target(name, dtype.type)
    x = state.registers.source(a, dtype.type)
    position, length = (state.registers.source(each, np.uint32) for each in (b, c))
    bits = dtype.itemsize * 8

    def compute() -> Array:
        start = (position & np.uint32(255)).astype(np.int64)
        count = (length & np.uint32(255)).astype(np.int64)
        value = x.view(f"u{dtype.itemsize}").astype(np.uint64)
        kept = _ones(np.minimum(count, np.maximum(bits - start, 0)))
        field = (value >> np.minimum(start, 63).astype(np.uint64)) & kept
        if dtype.kind == "i":
            sign = np.clip(start + count - 1, 0, bits - 1).astype(np.uint64)
            negative = (value >> sign & np.uint64(1) != 0) & (count > 0)
            field = np.where(negative, field | ~kept, field)
        return field.astype(dtype)

    return assign(target, compute)


def _ones(count: Array) -> Array:
    """Numbers with `count` low bits set, 0 to 64; uint64."""
    one = np.uint64(1)
    short: Array = np.left_shift(one, np.minimum(count, 63).astype(np.uint64)) - one
    return np.where(count >= 64, ~np.uint64(0), short)


def _insert(state: State, instruction: Instruction, site: int) -> Handler:
    """bfi: the low bits of a put into b."""
    del site
    known(instruction)
    dtype = np.dtype(numpy_type(instruction.type))
    name, a, b, c, d = instruction.operands
    target = state.registers.target(name, dtype.type)
    x, y = (state.registers.source(each, dtype.type) for each in (a, b))
    position, length = (state.registers.source(each, np.uint32) for each in (c, d))
    bits = dtype.itemsize * 8

    def compute() -> Array:
        start = (position & np.uint32(255)).astype(np.int64)
        count = (length & np.uint32(255)).astype(np.int64)
        ones: Array = _ones(np.minimum(count, bits)).astype(dtype)
        where = np.minimum(start, bits - 1).astype(dtype)
        mask = np.where(start < bits, ones << where, dtype.type(0))
        return (y & ~mask) | ((x << where) & mask)

    return assign(target, compute)


def _permute(state: State, instruction: Instruction, site: int) -> Handler:
    """prmt: four bytes picked from eight, or their signs."""
    del site
    if len(instruction.words) != 2:
        raise Fault(UnsupportedInstruction, "prmt has only its general mode here")
    a, b, selector = typed(state, instruction, "u32")
    target = state.registers.target(instruction.operands[0], np.uint32)
    if not instruction.operands[3].startswith("%"):
        nibbles = [int(selector[0]) >> (4 * i) & 15 for i in range(4)]
        if all(nibble < 8 for nibble in nibbles):
            halves = (a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4))
            picks = [halves[nibble // 4][:, nibble % 4] for nibble in nibbles]
            return assign(target, lambda: np.stack(picks, 1).view(np.uint32)[:, 0])
    shifts = np.arange(0, 16, 4, dtype=np.uint32)

    def compute() -> Array:
        source = np.stack([a, b], 1).view(np.uint8)
        picks = (selector[:, None] >> shifts) & np.uint32(15)
        chosen = np.take_along_axis(source, (picks & np.uint32(7)).astype(np.int64), 1)
        signs = np.where(chosen & 128, np.uint8(255), np.uint8(0))
        return np.where(picks & np.uint32(8), signs, chosen).view(np.uint32)[:, 0]

    return assign(target, compute)


def _lookup(state: State, instruction: Instruction, site: int) -> Handler:
    """lop3: any logic function of three operands, by its truth table."""
    del site
    known(instruction)
    a, b, c = (state.registers.source(each, np.uint32) for each in instruction.operands[1:4])
    table = int(instruction.operands[4], 0)
    target = state.registers.target(instruction.operands[0], np.uint32)
    cases = [case for case in range(8) if table >> case & 1]
    terms = [tuple(case >> shift & 1 for shift in (2, 1, 0)) for case in cases]

    def compute() -> Array:
        result = np.zeros(state.threads, np.uint32)
        for x, y, z in terms:
            result |= (a if x else ~a) & (b if y else ~b) & (c if z else ~c)
        return result

    return assign(target, compute)


def _dot(state: State, instruction: Instruction, site: int) -> Handler:
    """dp4a.atype.btype: four byte products added to a word."""
    del site
    if len(instruction.words) != 3 or instruction.words[0] != "dp4a":
        raise Fault(UnsupportedInstruction, "only dp4a.type.type")
    kinds = [np.int8 if word == "s32" else np.uint8 for word in instruction.words[1:]]
    a, b, c = typed(state, instruction, "u32")
    target = state.registers.target(instruction.operands[0], np.uint32)

    def compute() -> Array:
        x, y = (
            v.view(k).reshape(-1, 4).astype(np.int64) for v, k in zip((a, b), kinds, strict=True)
        )
        return ((x * y).sum(1) + c).astype(np.uint32)

    return assign(target, compute)


def _counting(function: Callable[[Array], Array]) -> Builder:
    """popc, clz, brev, ...: of 32 or 64 bits; the result has 32 unless it is brev's."""

    def build(state: State, instruction: Instruction, site: int) -> Handler:
        del site
        known(instruction)
        dtype = numpy_type(instruction.type.replace("s", "u"))
        result = dtype if instruction.words[0] == "brev" else np.uint32
        target = state.registers.target(instruction.operands[0], result)
        (x,) = (state.registers.source(instruction.operands[1], dtype),)
        return assign(target, lambda: function(x))

    return build


def _bits(x: Array) -> Array:
    """[threads, width], the most significant bit first."""
    swapped = np.ascontiguousarray(x).view(np.uint8).reshape(len(x), -1)[:, ::-1]
    return np.unpackbits(swapped, axis=1)


def _reverse(x: Array) -> Array:
    flipped = np.packbits(_bits(x)[:, ::-1], axis=1)[:, ::-1]
    return np.ascontiguousarray(flipped).view(x.dtype)[:, 0]


def _leading(x: Array) -> Array:
    bits = _bits(x)
    return np.where(bits.any(1), bits.argmax(1), bits.shape[1])


BITS: Mapping[str, Builder] = {
    "shf": _funnel,
    "bfe": _field,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _lookup,
    "dp4a": _dot,
    "popc": _counting(lambda x: _bits(x).sum(1)),
    "clz": _counting(_leading),
    "brev": _counting(_reverse),
}
"""Builders by the first word of the opcode."""
