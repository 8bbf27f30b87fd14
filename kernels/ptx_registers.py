"""Registers of a block of threads, as arrays with one element a thread, and operands bound to them.

Every register has one array for the whole run; reading it as another type is a view, so an
instruction is bound once and then only computes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, UnsupportedInstruction
from .ptx_parse import Program, split

Array = NDArray[Any]

TYPES: Mapping[str, type[Any]] = {
    **{f"{kind}{bits}": t for kind in "bu" for bits, t in zip(
        (8, 16, 32, 64), (np.uint8, np.uint16, np.uint32, np.uint64), strict=True)},
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "f32x2": np.uint64,
    "u16x2": np.uint32,
    "s16x2": np.uint32,
    "pred": np.bool_,
}  # fmt: skip
"""The numpy type that holds a PTX type: raw bits where numpy has none."""

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

_INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_ADDRESS = re.compile(r"\[\s*([%$\w.]+)\s*(?:\+\s*(-?\w+)|(-\w+))?\s*\]$")


def numpy_type(name: str) -> type[Any]:
    """The numpy type of a PTX type; a Fault where PTX has more types than planish."""
    if name not in TYPES:
        raise Fault(UnsupportedInstruction, f"no arithmetic for the type {name}")
    return TYPES[name]


class Registers:
    """The register file of `threads` threads, and the constants and symbols beside it."""

    def __init__(self, program: Program, threads: int, symbols: Mapping[str, int]) -> None:
        self.threads = threads
        self.declared = program.registers
        self.symbols = symbols
        self.files: dict[str, Array] = {}
        self.blocks: dict[tuple[str, ...], Array] = {}
        self.constants: dict[tuple[str, Any], Array] = {}
        self.special: dict[str, Array] = {
            "%tid.x": np.arange(threads, dtype=np.uint32),
            "%ntid.x": self._full(threads),
            "%laneid": np.arange(threads, dtype=np.uint32) % np.uint32(32),
            "%warpid": np.arange(threads, dtype=np.uint32) // np.uint32(32),
            "%lanemask_lt": (1 << (np.arange(threads) % 32)).astype(np.uint32) - np.uint32(1),
        }
        for name in ("%tid.y", "%tid.z", "%smid", "%clock", "%globaltimer", "%cluster_ctarank"):
            self.special[name] = self._full(0)
        for name in ("%ntid.y", "%ntid.z", "%nsmid", "%cluster_nctarank"):
            self.special[name] = self._full(1)
        for axis in "xyz":
            for name in ("%ctaid.", "%nctaid."):
                self.special[name + axis] = self._full(0)

    def _full(self, value: int) -> Array:
        return np.full(self.threads, value, np.uint32)

    def start(self, block: Sequence[int], grid: Sequence[int]) -> None:
        """Clear the registers and enter the place of the block in the grid."""
        for axis, at, size in zip("xyz", block, grid, strict=True):
            self.special["%ctaid." + axis].fill(at)
            self.special["%nctaid." + axis].fill(size)
        for register in self.files.values():
            register.fill(0)

    def register(self, name: str) -> Array:
        """The bits of a register, unsigned or boolean [threads]."""
        found = self.files.get(name)
        if found is None:
            stem, mark, scope = name.partition("$")
            family = stem.rstrip("0123456789") + mark + scope
            kind = self.declared.get(name) or self.declared.get(family)
            if kind is None:
                raise Fault(UnsupportedInstruction, f"there is no register {name}")
            dtype = np.dtype(TYPES[kind])
            bits = dtype if dtype == np.bool_ else UNSIGNED[dtype.itemsize]
            found = self.files[name] = np.zeros(self.threads, bits)
        return found

    def rows(self, names: Sequence[str]) -> Array | None:
        """32-bit registers as rows of one array [names, threads]; None where that comes too late.

        Instructions with very many registers are faster so; bind them before all others.
        """
        key = tuple(names)
        if key not in self.blocks:
            if any(name in self.files for name in names):
                return None
            block = self.blocks[key] = np.zeros((len(names), self.threads), np.uint32)
            self.files.update(zip(names, block, strict=True))
        return self.blocks[key]

    def target(self, name: str, dtype: type[Any]) -> Array:
        """A register to write values of dtype to; "_" is a place that nobody reads.

        A register wider than the type is returned as the integer of its own width and the type's
        sign, so that copying a value extends it as PTX does.
        """
        if name == "_":
            return np.zeros(self.threads, dtype)
        register, wanted = self.register(name), np.dtype(dtype)
        if register.dtype == np.bool_ or wanted == np.bool_:
            return register
        if register.itemsize > wanted.itemsize:
            signed = np.issubdtype(wanted, np.signedinteger)
            return register.view(f"i{register.itemsize}") if signed else register
        return register.view(wanted)

    def source(self, operand: str, dtype: type[Any]) -> Array:
        """The values of a register, a constant, a symbol or a special register [threads].

        Of a register wider than the type the low bits are read.
        """
        wanted = np.dtype(dtype)
        if operand in self.special or operand.startswith("%clock"):
            found = self.special.get(operand, self.special["%clock"])
            return found if wanted.itemsize == 4 else self._constant(operand, 0, wanted)
        if not self._is_register(operand):
            return self._constant(operand, self._number(operand, wanted), wanted)
        register = self.register(operand)
        if register.dtype == np.bool_ or register.itemsize == wanted.itemsize:
            return register.view(wanted)
        if register.itemsize > wanted.itemsize:
            return register.view(wanted)[:: register.itemsize // wanted.itemsize]
        raise Fault(UnsupportedInstruction, f"{operand} is narrower than {wanted}")

    def sources(self, operand: str, dtype: type[Any]) -> list[Array]:
        """As `source`, of every element of {a, b, ...}, or of the operand itself."""
        return [self.source(part, dtype) for part in elements(operand)]

    def address(self, operand: str) -> tuple[Array, int]:
        """[base + offset]: the base's values, unsigned 32 or 64 bits, and the offset."""
        match = _ADDRESS.match(operand)
        if match is None:
            raise Fault(UnsupportedInstruction, f"cannot read the address {operand}")
        base, plus, minus = match.groups()
        offset = int(plus or minus or "0", 0)
        if self._is_register(base):
            return self.register(base), offset
        return self.source(base, np.uint64), offset

    def _is_register(self, operand: str) -> bool:
        if operand.startswith("%"):
            return True
        return operand in self.declared or operand in self.files

    def _number(self, operand: str, wanted: np.dtype[Any]) -> Any:
        """A constant's bits, as an integer that fits the type."""
        if operand.startswith(("0f", "0F", "0d", "0D")):
            bits = int(operand[2:], 16)
            kind = np.float32 if operand[1] in "fF" else np.float64
            if np.dtype(kind).itemsize == wanted.itemsize:
                return bits
            value = np.array(bits, UNSIGNED[np.dtype(kind).itemsize]).view(kind)
            return value.astype(wanted).view(UNSIGNED[wanted.itemsize])[()]
        if operand in ("true", "false"):
            return int(operand == "true")
        match = _INTEGER.match(operand)
        if match:
            number = int(operand.rstrip("U"), 0)
        elif operand.split("+")[0] in self.symbols:
            name, _, offset = operand.partition("+")
            number = self.symbols[name] + int(offset or "0", 0)
        else:
            raise Fault(UnsupportedInstruction, f"cannot read the operand {operand}")
        return number != 0 if wanted == np.bool_ else number % (1 << 8 * wanted.itemsize)

    def _constant(self, operand: str, number: Any, wanted: np.dtype[Any]) -> Array:
        key = (operand, wanted)
        if key not in self.constants:
            bits = np.bool_ if wanted == np.bool_ else UNSIGNED[wanted.itemsize]
            self.constants[key] = np.full(self.threads, number, bits).view(wanted)
        return self.constants[key]


def elements(operand: str) -> list[str]:
    """The parts of {a, b, ...}; an operand without braces is its only part."""
    return split(operand.strip("{} ")) if operand.startswith("{") else [operand]
