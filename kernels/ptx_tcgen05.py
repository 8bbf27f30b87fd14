"""tcgen05: matrix instructions that one thread gives, on tensor memory (PTX ISA 9.7.16).

That the registers of tcgen05.ld need tcgen05.wait::ld is not checked, nor are races for tensor
memory between warps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, OutOfBounds, UnsupportedInstruction
from .ptx_mbarrier import Place, barriers
from .ptx_parse import Instruction
from .ptx_registers import elements
from .ptx_state import Builder, Handler, Mask, State, addresses, side_by_side
from .ptx_tensor_core import WIDTHS, numbers
from .ptx_tensor_memory import COLUMNS, LANES, Product, TensorMemory, tensor_memory
from .ptx_warpgroup import descriptor_index

Array = NDArray[Any]

_SWIZZLE = {0: (16, 0), 2: (128, 7), 4: (64, 3), 6: (32, 1)}
_KINDS = {
    "kind::f16": {0: "f16", 1: "bf16"},
    "kind::tf32": {2: "tf32"},
    "kind::f8f6f4": {0: "e4m3", 1: "e5m2"},
    "kind::i8": {0: "u8", 1: "s8"},
}
"""Types of A and B by their number in the instruction descriptor."""


def _build(state: State, instruction: Instruction, site: int) -> Handler:
    """Builder of all of tcgen05."""
    memory = tensor_memory(state)
    if "cta_group::2" in instruction.words:
        raise Fault(UnsupportedInstruction, "pairs of blocks")
    match instruction.words[1]:
        case "alloc":
            return _allocate(state, instruction, site)
        case "dealloc" | "relinquish_alloc_permit" | "fence::before_thread_sync":
            return lambda mask: None
        case "fence::after_thread_sync" | "wait::ld":
            return lambda mask: None
        case "wait::st":
            return lambda mask: memory.stored.fill(False)
        case "ld" | "st":
            return _move(state, instruction)
        case "mma":
            return _multiply(state, instruction, site)
        case "commit":
            return _commit(state, instruction)
        case other:
            raise Fault(UnsupportedInstruction, f"tcgen05.{other} is new")


def _allocate(state: State, instruction: Instruction, site: int) -> Handler:
    """alloc [shared], columns: the address goes to shared memory, once for a warp."""
    now = addresses(state, instruction.operands[0])
    count = state.registers.source(instruction.operands[1], np.uint32)
    memory = tensor_memory(state)

    def run(mask: Mask) -> None:
        thread = state.active(mask)[:1]
        columns = int(count[thread[0]])
        if columns & (columns - 1) or columns < 32 or memory.used + columns > COLUMNS:
            raise Fault(OutOfBounds, f"{columns} columns of tensor memory cannot be allocated")
        base = np.full((1, 1), memory.used, np.uint32)
        memory.used += columns
        state.shared.store(now()[thread], thread, 4, base, site, state.traffic)

    return run


def _move(state: State, instruction: Instruction) -> Handler:
    """ld and st of 32x32b and 16x32bx2: a lane of tensor memory a thread, a column a register."""
    words = set(instruction.words[2:-1]) - {"sync", "aligned"}
    shape = words & {"32x32b", "16x32bx2"}
    if not shape or len(words) != 2:
        raise Fault(UnsupportedInstruction, f"{instruction.opcode} is new")
    store = instruction.words[1] == "st"
    operands = list(instruction.operands)
    names = elements(operands.pop(-1 if store else 0))
    now = addresses(state, operands[0])
    half = int(operands[1], 0) if operands[1:] else 0
    memory = tensor_memory(state)
    get = state.registers.source if store else state.registers.target
    registers = [get(name, np.uint32) for name in names]
    lane = state.everyone & 31
    low = lane & 15 if "16x32bx2" in shape else lane
    shift = np.where(lane > 15, half, 0) if "16x32bx2" in shape else np.zeros_like(lane)

    def run(mask: Mask) -> None:
        threads = state.active(mask)
        at = now()[threads]
        lanes = (at >> 16) + low[threads]
        columns = (at & 0xFFFF) + shift[threads]
        if ((at >> 21) & 3 != threads // 32 & 3).any():
            raise Fault(OutOfBounds, "a warp uses lanes of tensor memory that are another's")
        memory.region(lanes, int(columns.min()), int(np.ptp(columns)) + len(names))
        index = (lanes[:, None], columns[:, None] + np.arange(len(names)))
        memory.idle(index)
        if store:
            memory.data[index] = side_by_side(registers)[threads]
            memory.stored[index] = True
            return
        values = memory.data[index]
        for column, register in enumerate(registers):
            register[threads] = values[:, column]

    return run


@dataclass(frozen=True, slots=True)
class _Form:
    """What an instruction descriptor says (PTX ISA, table of tcgen05 instruction descriptors)."""

    rows: int
    columns: int
    left: str
    right: str
    integer: bool
    turned: tuple[bool, bool]
    sign: int


def _form(bits: int, kind: str) -> _Form:
    types = _KINDS[kind]
    left, right, to = bits >> 7 & 7, bits >> 10 & 7, bits >> 4 & 3
    rows = (bits >> 24 & 31) << 4
    if left not in types or right not in types or bits & 0xF or rows not in (64, 128):
        raise Fault(UnsupportedInstruction, f"a matrix instruction of descriptor {bits:#x}")
    integer = kind == "kind::i8"
    if to != (2 if integer else 1):
        raise Fault(UnsupportedInstruction, "accumulators other than f32 and s32")
    turned = (bool(bits >> 15 & 1), bool(bits >> 16 & 1))
    sign = -1 if (bits >> 13 & 1) != (bits >> 14 & 1) else 1
    return _Form(rows, (bits >> 17 & 63) << 3, types[left], types[right], integer, turned, sign)


def _multiply(state: State, instruction: Instruction, site: int) -> Handler:
    """mma [D], A, B, descriptor, keep: D = A B (+ D); A in shared or in tensor memory."""
    kind = instruction.words[-1]
    if kind not in _KINDS or len(instruction.operands) != 5:
        raise Fault(UnsupportedInstruction, f"{instruction.opcode} is new")
    goal, a, b, what, keeps = instruction.operands
    to, memory = addresses(state, goal), tensor_memory(state)
    in_memory = a.startswith("[")
    a_at = addresses(state, a) if in_memory else None
    a_bits = None if in_memory else state.registers.source(a, np.uint64)
    b_bits = state.registers.source(b, np.uint64)
    descriptor = state.registers.source(what, np.uint32)
    keep = state.registers.source(keeps.lstrip("!"), np.bool_)
    flip = keeps.startswith("!")

    def run(mask: Mask) -> None:
        for thread in state.active(mask):
            form = _form(int(descriptor[thread]), kind)
            depth = 32 // WIDTHS[form.left]
            held: list[Place] = []
            if a_at is not None:
                left = _from_memory(memory, int(a_at()[thread]), form, depth)
            else:
                assert a_bits is not None
                shape = (form.rows, depth)
                tile = (int(a_bits[thread]), shape, form.left, form.turned[0])
                left = _from_shared(state, *tile, site, held)
            tile = (int(b_bits[thread]), (form.columns, depth), form.right, form.turned[1])
            right = _from_shared(state, *tile, site, held)
            at = int(to()[thread])
            region = memory.region(_lanes(at >> 16, form.rows), at & 0xFFFF, form.columns)
            _add(memory, region, form.sign * np.matmul(left, right.T), form, keep[thread] != flip)
            if state.check:
                memory.started(Product(held, region))

    return run


def _lanes(first: int, rows: int) -> Array:
    """Where the rows of a matrix lie: 64 rows use half of each warp's lanes."""
    row = np.arange(rows)
    return first + (row if rows == LANES else row // 16 * 32 + row % 16)


def _add(
    memory: TensorMemory, region: tuple[Array, slice], product: Array, form: _Form, keep: bool
) -> None:
    dtype = np.int32 if form.integer else np.float32
    result = product.astype(dtype)
    if keep:
        result = memory.data[region].view(dtype) + result
        memory.settled(region)
    memory.data[region] = result.view(np.uint32)


def _from_memory(memory: TensorMemory, at: int, form: _Form, depth: int) -> Array:
    """A [rows, depth] from tensor memory, packed in columns."""
    width = WIDTHS[form.left]
    region = memory.region(_lanes(at >> 16, form.rows), at & 0xFFFF, depth * width // 4)
    memory.settled(region)
    raw = np.ascontiguousarray(memory.data[region]).view(f"u{width}")
    return numbers(raw, form.left)


def _from_shared(
    state: State,
    descriptor: int,
    shape: tuple[int, int],
    kind: str,
    turned: bool,
    site: int,
    held: list[Place],
) -> Array:
    """A tile [rows, depth] by its descriptor, which the product then holds."""
    layout = descriptor >> 61 & 7
    if layout not in _SWIZZLE:
        raise Fault(UnsupportedInstruction, f"a matrix descriptor of layout {layout}")
    width = WIDTHS[kind]
    index = descriptor_index(descriptor, shape, width, turned, _SWIZZLE[layout])
    if int(index.max() + 1) * width > state.shared.size:
        raise Fault(OutOfBounds, "a matrix descriptor reaches beyond shared memory")
    if state.check:
        state.shared.read_by_proxy(index, width, site)
        held.append((width, index))
    return numbers(state.shared.data[width][index], kind)


def _commit(state: State, instruction: Instruction) -> Handler:
    """commit [mbarrier]: an arrival once all products so far are done."""
    if "multicast::cluster" in instruction.words:
        raise Fault(UnsupportedInstruction, "clusters")
    now = addresses(state, instruction.operands[0])
    memory, known = tensor_memory(state), barriers(state)

    def run(mask: Mask) -> None:
        for thread in state.active(mask):
            known.completed(int(now()[thread]), partial(memory.retire, list(memory.products)))

    return run


TCGEN05: Mapping[str, Builder] = {"tcgen05": _build}
"""Builders by the first word of the opcode."""
