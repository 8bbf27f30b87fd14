"""Floating-point instructions (PTX ISA 9.7.3 to 9.7.5) of f16, bf16, f32, f64 and packed pairs.

Sums, products, quotients, roots and fused multiply-adds are rounded correctly; the approximate
instructions (ex2, lg2, sin, ...) are computed as exactly as numpy does, which is within the bounds
that NVIDIA states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_numbers import from_bf16, fused, to_bf16, to_odd
from .ptx_parse import Instruction
from .ptx_registers import elements
from .ptx_state import Builder, Handler, Mask, State, assign, known, packed

Array = NDArray[Any]

_SMALLEST = np.float32(2.0**-126)
_ROUNDING = ("rn", "approx", "full", "ftz", "sat", "noftz")

HALVES = {"f16": np.float16, "f16x2": np.float16, "bf16": np.uint16, "bf16x2": np.uint16}
PAIRS = ("f16x2", "bf16x2", "f32x2")
FLOATS = (*HALVES, "f32", "f64", "f32x2")


class Operands:
    """The target and the sources of one instruction as arrays of numbers, pairs side by side."""

    def __init__(self, state: State, instruction: Instruction) -> None:
        kind = instruction.type
        self.kind, self.state = kind, state
        self.pair = kind in PAIRS
        nbytes = {"f16": 2, "bf16": 2, "f64": 8, "f32x2": 8}.get(kind, 4)
        self.dtype = {**HALVES, "f64": np.float64}.get(kind, np.float32)
        name, *sources = instruction.operands
        self.sources = [packed(state, each, self.dtype, nbytes) for each in sources]
        bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}
        parts = elements(name)
        width = nbytes // len(parts)
        self.targets = [
            state.registers.target(part, bits[width]).view(self.dtype).reshape(state.threads, -1)
            for part in parts
        ]

    @property
    def direct(self) -> bool:
        """Whether numpy computes in this type itself."""
        return self.kind in ("f32", "f64", "f32x2") and len(self.targets) == 1

    def read(self) -> list[Array]:
        """[threads, parts] each: float16 and bfloat16 as the float32 that they are."""
        values = [source() for source in self.sources]
        if self.kind.startswith("bf16"):
            return [from_bf16(value) for value in values]
        if self.kind.startswith("f16"):
            return [value.astype(np.float32) for value in values]
        return values

    def write(self, value: Array, mask: Mask) -> None:
        """Round to the type, once, from float32, or from float64 rounded to odd."""
        where = mask if mask is True else mask[:, None]
        if self.kind.startswith("bf16"):
            value = to_bf16(to_odd(value) if value.dtype == np.float64 else value)
        start = 0
        for target in self.targets:
            stop = start + target.shape[1]
            np.copyto(target, value[:, start:stop], where=where, casting="unsafe")
            start = stop


def floating(function: Callable[..., Any], *allowed: str) -> Builder:
    """An instruction that is a function of its operands; a ufunc where numpy has one."""

    def build(state: State, instruction: Instruction, site: int) -> Handler:
        del site
        modifiers = known(instruction, *_ROUNDING, *allowed)
        operands = Operands(state, instruction)
        flush, clip = "ftz" in modifiers, "sat" in modifiers
        if operands.direct and isinstance(function, np.ufunc) and not (flush or clip):
            return _in_place(operands, function)

        def run(mask: Mask) -> None:
            values = operands.read()
            if flush:
                values = [_flush(value) for value in values]
            result = function(*values)
            if flush:
                result = _flush(result.astype(np.float32))
            if clip:
                result = np.fmin(np.fmax(result, 0), 1)
            operands.write(result, mask)

        return run

    return build


def _in_place(operands: Operands, function: np.ufunc) -> Handler:
    target, get = operands.targets[0], operands.sources
    if operands.pair:
        return lambda mask: function(
            *(source() for source in get),
            out=target,
            where=mask if mask is True else mask[:, None],
        )
    flat = target[:, 0]
    sources = [source()[:, 0] for source in get]
    return lambda mask: function(*sources, out=flat, where=mask)


def _flush(value: Array) -> Array:
    """Subnormal float32 to zero of the same sign."""
    return np.where(np.abs(value) < _SMALLEST, np.copysign(np.float32(0), value), value)


def _fused(a: Array, b: Array, c: Array) -> Array:
    if a.dtype != np.float64:
        return fused(a, b, c)
    # float64: the error of the product (Dekker 1971) and of the sum (Knuth) are added at the end
    product = a * b
    total = product + c
    split = 134217729.0
    a1, b1 = a * split, b * split
    a1, b1 = a1 - (a1 - a), b1 - (b1 - b)
    a2, b2 = a - a1, b - b1
    low = a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)
    part = total - product
    exact = total + (((product - (total - part)) + (c - part)) + low)
    return np.where(np.isfinite(exact), exact, total)


def _reduce(function: np.ufunc, nan: np.ufunc) -> Builder:
    """min and max of two or three; .NaN passes a NaN on, otherwise the number wins."""

    def build(state: State, instruction: Instruction, site: int) -> Handler:
        chosen = nan if "NaN" in instruction.words else function
        if len(instruction.operands) == 3:
            return floating(chosen, "NaN")(state, instruction, site)
        return floating(lambda a, b, c: chosen(chosen(a, b), c), "NaN")(state, instruction, site)

    return build


def _reciprocal_root(x: Array) -> Array:
    return (1 / np.sqrt(x.astype(np.float64))).astype(x.dtype)


def _in_double(function: np.ufunc) -> Callable[[Array], Array]:
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def is_mixed(instruction: Instruction) -> bool:
    """add.f32.f16 and the like (PTX 8.6): halves added to or multiplied into float32."""
    return instruction.words[-2] == "f32" and instruction.type in ("f16", "bf16")


def mixed(state: State, instruction: Instruction, site: int) -> Handler:
    """Builder of add, sub and fma of which all operands but the last are halves."""
    del site
    known(instruction, "rn", "f32")
    half = np.float16 if instruction.type == "f16" else np.uint16
    name, *operands = instruction.operands
    target = state.registers.target(name, np.float32)
    halves = [state.registers.source(operand, half) for operand in operands[:-1]]
    last = state.registers.source(operands[-1], np.float32)
    functions: dict[str, Callable[..., Array]] = {
        "add": np.add,
        "sub": np.subtract,
        "fma": _fused,
    }
    function = functions[instruction.words[0]]
    widen = from_bf16 if half is np.uint16 else lambda value: value.astype(np.float32)
    return assign(target, lambda: function(*(widen(value) for value in halves), last))


FLOAT: Mapping[str, Builder] = {
    "add": floating(np.add),
    "sub": floating(np.subtract),
    "mul": floating(np.multiply),
    "fma": floating(_fused),
    "mad": floating(_fused),
    "div": floating(np.divide),
    "min": _reduce(np.fmin, np.minimum),
    "max": _reduce(np.fmax, np.maximum),
    "abs": floating(np.absolute),
    "neg": floating(np.negative),
    "rcp": floating(np.reciprocal),
    "sqrt": floating(np.sqrt),
    "rsqrt": floating(_reciprocal_root),
    "ex2": floating(np.exp2),
    "lg2": floating(np.log2),
    "sin": floating(_in_double(np.sin)),
    "cos": floating(_in_double(np.cos)),
    "tanh": floating(np.tanh),
    "copysign": floating(lambda sign, value: np.copysign(value, sign)),
}
"""Builders by the first word of the opcode, for operands that are floating-point numbers."""
