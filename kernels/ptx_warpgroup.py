"""wgmma: matrix instructions of four warps that run on their own until waited for (sm_90).

They compute at once, but until wgmma.wait_group retires them their accumulators and register
operands may not be touched and their operands in shared memory not be overwritten: a Fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, NotWaitedFor, OutOfBounds, UnsupportedInstruction
from .ptx_parse import Instruction
from .ptx_registers import elements
from .ptx_state import Builder, Handler, Mask, State
from .ptx_tensor_core import WIDTHS, fragment, numbers, operand_types

Array = NDArray[Any]

_GROUP = 128
_SWIZZLE = {0: (16, 0), 1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""Bytes of a row and the address bits mixed into it, by the descriptor's layout type."""


@dataclass(slots=True)
class _Batch:
    """Instructions between two commits: accumulators, register operands, shared operands."""

    accumulators: set[str] = field(default_factory=set[str])
    operands: set[str] = field(default_factory=set[str])
    held: list[tuple[int, Array]] = field(default_factory=list[tuple[int, Array]])


class Flight:
    """What the matrix instructions under way own."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.clear()
        state.on_start.append(self.clear)
        state.shared.holders.append(lambda: [p for b in (*self.groups, self.open) for p in b.held])

    def clear(self) -> None:
        self.open, self.groups = _Batch(), list[_Batch]()
        self.accumulators, self.operands = set[str](), set[str]()
        self.unfenced = set[str]()
        self.any = False

    def started(self, accumulators: set[str], operands: set[str]) -> None:
        if self.unfenced and not self.unfenced.isdisjoint(accumulators | operands):
            raise Fault(
                NotWaitedFor,
                "a matrix instruction uses registers that were written just before",
                expected="wgmma.fence between the write and the instruction",
            )
        self.open.accumulators |= accumulators
        self.open.operands |= operands
        self.accumulators |= accumulators
        self.operands |= operands
        self.any = True

    def hold(self, unit: int, index: Array) -> None:
        self.open.held.append((unit, index))
        self.state.shared.hold([(unit, index)])

    def commit(self) -> None:
        self.groups.append(self.open)
        self.open = _Batch()

    def wait(self, rest: int) -> None:
        """Retire all groups but the last `rest`."""
        if len(self.groups) <= rest:
            return
        self.groups = self.groups[len(self.groups) - rest :]
        left = [*self.groups, self.open]
        self.accumulators = set[str]().union(*(batch.accumulators for batch in left))
        self.operands = set[str]().union(*(batch.operands for batch in left))
        self.state.shared.rehold()
        self.any = bool(self.accumulators or self.operands)

    def moved(self, name: str, source: str) -> None:
        """A copy of an accumulator is under way like the accumulator."""
        for batch in (*self.groups, self.open):
            if source in batch.accumulators:
                batch.accumulators.add(name)
        self.accumulators.add(name)


def flight(state: State) -> Flight:
    """The block's only Flight."""
    if "flight" not in state.part:
        state.part["flight"] = Flight(state)
        state.shared.proxies = True
    return state.part["flight"]


def guarded(state: State, instruction: Instruction, action: Handler, owned: set[str]) -> Handler:
    """The handler of another instruction that touches registers which wgmma uses."""
    names = [set(re.findall(r"%[\w$]+", operand)) & owned for operand in instruction.operands]
    if not any(names):
        return action
    writes = set[str]() if instruction.words[0] in ("st", "red", "setp") else names[0]
    reads = set[str]().union(*names) - writes
    air = flight(state)
    copy = instruction.words[0] == "mov" and not instruction.operands[1].startswith("{")

    def run(mask: Mask) -> None:
        if air.any:
            busy = (writes & (air.accumulators | air.operands)) | (reads & air.accumulators)
            if busy and copy and not writes & (air.accumulators | air.operands):
                air.moved(instruction.operands[0], instruction.operands[1])
            elif busy:
                raise Fault(
                    NotWaitedFor,
                    f"a matrix instruction under way still owns {', '.join(sorted(busy))}",
                    expected="wgmma.wait_group before the register is used",
                )
        if not copy:  # LLVM moves copies past the fence, and ptxas orders them
            air.unfenced |= writes
        action(mask)

    return run


def accumulators(instruction: Instruction) -> list[str]:
    """Registers that the instruction adds into."""
    return elements(instruction.operands[0])


def register_operands(instruction: Instruction) -> list[str]:
    """Registers of A, where it is not in shared memory."""
    return elements(instruction.operands[1]) if instruction.operands[1].startswith("{") else []


def _warpgroup(state: State, instruction: Instruction, site: int) -> Handler:
    """Builder of all of wgmma."""
    air = flight(state)
    match instruction.words[1]:
        case "mma_async":
            return _multiply(state, instruction, site)
        case "fence":
            return lambda mask: air.unfenced.clear()
        case "commit_group":
            return lambda mask: air.commit()
        case "wait_group":
            rest = int(instruction.operands[0], 0)
            return lambda mask: air.wait(rest)
        case other:
            raise Fault(UnsupportedInstruction, f"wgmma.{other} is new")


def _multiply(state: State, instruction: Instruction, site: int) -> Handler:
    """wgmma.mma_async: D[64, N] = A[64, K] B[K, N] + D for every active warp group."""
    shape = next(filter(None, (re.match(r"m64n(\d+)k(\d+)$", w) for w in instruction.words)))
    columns, depth = int(shape.group(1)), int(shape.group(2))
    to, left, right = operand_types(instruction)
    if {"sp", "satfinite"} & set(instruction.words) or to not in ("f32", "s32"):
        raise Fault(UnsupportedInstruction, f"{instruction.opcode} is new")
    signs, transposed = _flags(instruction)
    air, names = flight(state), set(accumulators(instruction))
    own = set(register_operands(instruction))
    add = _accumulate(state, instruction, to, columns)
    scale = state.registers.source(instruction.operands[3], np.bool_)
    b_of = _Tiles(state, instruction.operands[2], right, columns, depth, transposed[1], site)
    a_operand = instruction.operands[1]
    if own:
        part = fragment(state, a_operand, left, 2, depth)
        a_of = lambda group: part()[4 * group : 4 * group + 4].reshape(64, -1)  # noqa: E731
    else:
        a_of = _Tiles(state, a_operand, left, 64, depth, transposed[0], site).read

    def run(mask: Mask) -> None:
        air.started(names, own)
        for group in range(state.threads // _GROUP):
            if mask is not True and not mask[group * _GROUP]:
                continue
            product = np.matmul(a_of(group), b_of.read(group).T)
            if signs < 0:
                product = -product
            add(group, product, bool(scale[group * _GROUP]))

    return run


def _flags(instruction: Instruction) -> tuple[int, tuple[bool, bool]]:
    """(the sign of the product, whether A and B are stored with K outermost)."""
    flags = [int(operand, 0) for operand in instruction.operands[4:]]
    signs = flags[0] * flags[1] if len(flags) >= 2 else 1
    turned = [bool(flag) for flag in flags[2:]]
    if len(turned) == 1:
        turned = [False, *turned]
    return signs, (turned[0], turned[1]) if turned else (False, False)


def _accumulate(
    state: State, instruction: Instruction, to: str, columns: int
) -> Callable[[int, Array, bool], None]:
    """A function that adds a product [64, columns] to the accumulators of a warp group."""
    names = accumulators(instruction)
    dtype = np.float32 if to == "f32" else np.int32
    block = state.registers.rows(names)
    registers = [state.registers.target(name, dtype) for name in names]
    whole = None if block is None else block.view(dtype)

    def add(group: int, product: Array, keep: bool) -> None:
        # thread (warp, r, c) holds rows 16 warp + r + 8 h and columns 8 i + 2 c + k as (i, h, k)
        parts = product.reshape(4, 2, 8, columns // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
        flat = parts.reshape(len(names), _GROUP).astype(dtype)
        where = slice(group * _GROUP, group * _GROUP + _GROUP)
        if whole is not None:
            whole[:, where] = whole[:, where] + flat if keep else flat
            return
        for register, value in zip(registers, flat, strict=True):
            register[where] = register[where] + value if keep else value

    return add


class _Tiles:
    """Tiles of an operand in shared memory by their descriptors (PTX ISA 9.7.15.5.1)."""

    def __init__(
        self, state: State, operand: str, kind: str, rows: int, depth: int, turned: bool, site: int
    ) -> None:
        self.state, self.kind, self.site = state, kind, site
        self.shape, self.turned = (rows, depth), turned
        self.width = WIDTHS[kind]
        self.descriptor = state.registers.source(operand, np.uint64)
        self.known: dict[int, Array] = {}

    def read(self, group: int) -> Array:
        """[rows, depth] as numbers."""
        descriptor = int(self.descriptor[group * _GROUP])
        index = self.known.get(descriptor)
        if index is None:
            index = self.known[descriptor] = self._index(descriptor)
        shared = self.state.shared
        if shared.check:
            shared.read_by_proxy(index, self.width, self.site)
            flight(self.state).hold(self.width, index)
        return numbers(shared.data[self.width][index], self.kind)

    def _index(self, descriptor: int) -> Array:
        layout = _SWIZZLE[descriptor >> 62 & 3]
        index = descriptor_index(descriptor, self.shape, self.width, self.turned, layout)
        if int(index.max() + 1) * self.width > self.state.shared.size:
            raise Fault(
                OutOfBounds,
                "a matrix descriptor reaches beyond shared memory",
                expected=f"within {self.state.shared.size} bytes",
                found=f"byte {int(index.max()) * self.width}, descriptor {descriptor:#x}",
            )
        return index


def descriptor_index(
    descriptor: int, shape: tuple[int, int], width: int, turned: bool, layout: tuple[int, int]
) -> Array:
    """Where the elements [rows, depth] of a tile lie, in elements of `width` bytes.

    Fields in units of 16 bytes: start (bits 0-13), leading and stride offset (16-29, 32-45). Rows
    of 8 form a core. layout: bytes of a row, and the address bits mixed into its 16-byte pieces.
    turned: the depth is outermost.
    """
    start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    span, bits = layout
    row, column = np.arange(shape[0])[:, None], np.arange(shape[1])[None]
    if turned:
        chunk = span // width
        at = start + row // chunk * leading + column // 8 * stride
        at = at + column % 8 * span + row % chunk * width
    else:
        offset = column * width
        at = start + row // 8 * stride + row % 8 * span
        at = at + (offset if bits else offset % span + offset // span * leading)
    return (at ^ ((at >> 7 & bits) << 4)) // width


WARPGROUP: Mapping[str, Builder] = {"wgmma": _warpgroup}
"""Builders by the first word of the opcode."""
