"""What the handlers of instructions share: registers, memories and counters of one execution.

A handler is bound to an instruction once; it is called with the mask of the threads that execute,
or True for all. A table of a family of instructions maps the first word of an opcode to a builder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, UnsupportedInstruction
from .ptx_global import GlobalMemory
from .ptx_parse import Instruction, Program
from .ptx_registers import Registers, elements, numpy_type
from .ptx_shared import SharedMemory
from .ptx_traffic import Traffic

Array = NDArray[Any]
Mask = Any
"""True, or a boolean array [threads]."""
Handler = Callable[[Mask], Any]

SHARED_WINDOW, LOCAL_WINDOW = 1 << 56, 1 << 57
"""Where generic addresses of shared and of a thread's local memory begin."""


class State:
    """One block of threads, run again and again for every program of the grid."""

    def __init__(
        self,
        program: Program,
        threads: int,
        shared: int,
        memory: GlobalMemory,
        values: Mapping[str, int],
        check: bool,
    ) -> None:
        self.program, self.threads, self.check = program, threads, check
        self.memory, self.values, self.traffic = memory, values, Traffic()
        symbols, local, shared = _place(program, memory, shared)
        self.registers = Registers(program, threads, symbols)
        self.shared = SharedMemory(shared, threads, check, self._shared_race)
        self.local = np.zeros((threads, local), np.uint8)
        self.everyone = np.arange(threads)
        self.warps = threads // 32
        self.races = 0
        self.race_sites: dict[str, None] = {}
        self.on_start: list[Callable[[], None]] = []
        self.on_end: list[Callable[[], None]] = []
        self.part: dict[str, Any] = {}
        self.polled = False

    def start(self, block: Sequence[int], grid: Sequence[int], number: int) -> None:
        """Begin the program at `block` of the grid."""
        self.registers.start(block, grid)
        self.shared.start()
        self.memory.start(number)
        for reset in self.on_start:
            reset()

    def end(self) -> None:
        """The program has ended: its last epoch is compared."""
        for finish in self.on_end:
            finish()
        self.shared.barrier()

    def active(self, mask: Mask) -> Array:
        return self.everyone if mask is True else np.flatnonzero(mask)

    def race(self, site: int, what: str) -> None:
        self.races += 1
        self.race_sites.setdefault(f"{what}: {self.program.instructions[site].place}")

    def _shared_race(self, writer: int, other: int, count: int) -> None:
        del count
        first, second = self.program.instructions[writer], self.program.instructions[other]
        self.races += 1
        self.race_sites.setdefault(f"shared memory: {first.place} against {second.place}")


Builder = Callable[[State, Instruction, int], Handler]
"""(state, instruction, its number) to its handler."""


def _place(program: Program, memory: GlobalMemory, dynamic: int) -> tuple[dict[str, int], int, int]:
    """Addresses of the variables; bytes of local and of shared memory.

    Static shared variables precede the dynamic array (the one without a size).
    """
    symbols, local, shared = dict[str, int](), 0, 0
    for name, (space, size, data) in program.variables.items():
        if space == "shared":
            shared = -(-shared // 128) * 128
            symbols[name], shared = shared, shared + size
        elif space == "local":
            local = -(-local // 16) * 16
            symbols[name], local = local, local + size
        else:
            content = np.zeros(max(size, len(data), 1), np.uint8)
            content[: len(data)] = np.frombuffer(data, np.uint8)
            symbols[name] = memory.add(content, space == "global")
    for name, (space, size, _) in program.variables.items():
        if space == "shared" and size == 0:
            symbols[name] = -(-shared // 128) * 128 if shared else 0
    return symbols, local, max(shared, 0) + dynamic


def known(instruction: Instruction, *allowed: str) -> set[str]:
    """The modifiers between opcode and type; a Fault where one is not allowed."""
    modifiers = set(instruction.words[1:-1])
    unknown = modifiers.difference(allowed)
    if unknown:
        raise Fault(UnsupportedInstruction, f"the modifiers {', '.join(sorted(unknown))} are new")
    return modifiers


def addresses(state: State, operand: str) -> Callable[[], Array]:
    """A function to the signed 64-bit addresses that [base + offset] now stands for [threads]."""
    base, offset = state.registers.address(operand)

    def now() -> Array:
        at = base.astype(np.int64)
        if offset:
            at += offset
        return at

    return now


def assign(target: Array, compute: Callable[[], Array]) -> Handler:
    """A handler that writes computed values to a register of the active threads."""

    def run(mask: Mask) -> None:
        np.copyto(target, compute(), where=mask, casting="unsafe")

    return run


def typed(state: State, instruction: Instruction, kind: str, first: int = 1) -> list[Array]:
    """The operands from `first` on, read as the PTX type."""
    dtype = numpy_type(kind)
    return [state.registers.source(operand, dtype) for operand in instruction.operands[first:]]


def packed(state: State, operand: str, dtype: type[Any], nbytes: int) -> Callable[[], Array]:
    """A function to an operand of nbytes a thread as [threads, parts] of dtype.

    The operand is one register, or {a, b, ...} whose elements lie side by side.
    """
    parts = elements(operand)
    width = nbytes // len(parts)
    bits = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}[width]
    sources = [state.registers.source(part, numpy_type(bits)) for part in parts]
    if len(sources) == 1:
        only = sources[0].view(dtype).reshape(state.threads, -1)
        return lambda: only
    return lambda: side_by_side(sources).view(dtype)


def side_by_side(columns: Sequence[Array]) -> Array:
    """[threads, columns] of arrays [threads]; np.stack does the same in four times the time."""
    out = np.empty((len(columns[0]), len(columns)), columns[0].dtype)
    for at, column in enumerate(columns):
        out[:, at] = column
    return out
