"""Executes PTX on the CPU: what a GPU would compute, and the mistakes that it would not report.

The PTX that Triton emits for sm_80 to sm_120 runs in numpy, one program of the grid after another.
Found are races, accesses out of bounds, and reads of data that was not waited for; counted are
instructions, sectors and shared-memory wavefronts. Not modelled: time, the order in which tensor
cores add, and what ptxas makes of the PTX.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..ir.errors import WrongInput
from .ptx_decode import unsupported
from .ptx_errors import (
    EndlessLoop,
    NotWaitedFor,
    OutOfBounds,
    SimulationError,
    UnsupportedInstruction,
)
from .ptx_global import GlobalMemory
from .ptx_machine import Machine
from .ptx_parse import Program, parse
from .ptx_state import State

__all__ = [
    "EndlessLoop",
    "Execution",
    "NotWaitedFor",
    "OutOfBounds",
    "SimulationError",
    "UnsupportedInstruction",
    "execute",
    "opcodes_not_supported",
]

_SITES = 8
_MATRIX = ("mma.", "wgmma.mma", "tcgen05.mma")


@dataclass(frozen=True)
class Execution:
    """What one launch did.

    instructions: executed by a block, summed over the grid. races: conflicting pairs of accesses;
    race_sites: the first of them, by text. opcodes: executions by opcode. Bytes and 32-byte
    sectors of global memory; shared-memory wavefronts, and those needed without bank conflicts.
    """

    instructions: int
    races: int
    race_sites: tuple[str, ...]
    opcodes: Mapping[str, int]
    global_load_bytes: int
    global_load_sectors: int
    global_store_bytes: int
    global_store_sectors: int
    shared_wavefronts: int
    shared_ideal: int

    @property
    def matrix_instructions(self) -> int:
        """Matrix multiplications executed: by warps, warp groups (wgmma), blocks (tcgen05)."""
        return sum(count for opcode, count in self.opcodes.items() if opcode.startswith(_MATRIX))


def execute(
    ptx: str,
    grid: Sequence[int],
    arguments: Sequence[Tensor | int | float],
    *,
    threads: int,
    shared: int,
    check: bool = True,
    limit: int = 2_000_000,
) -> Execution:
    """Run the entry function of a PTX module over a grid.

    grid: one to three sizes. arguments: in the order of the parameters; tensors on the CPU are
    read and written in place within their storages; parameters that follow (Triton's scratch
    pointers) are 0, or scratch where tensor maps need it. threads: of a block, a multiple of
    32. shared: bytes of dynamic shared memory. check: look for races and for data not waited
    for. limit: instructions of one program. Raises SimulationError, with the instruction, its
    line and its source.
    """
    if threads <= 0 or threads % 32:
        raise WrongInput("a block has whole warps", expected="a multiple of 32", found=str(threads))
    program = parse(ptx)
    sizes = (*grid, 1, 1)[:3]
    races: list[tuple[int, str]] = []
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    memory = GlobalMemory(tensors, check, lambda site, what: races.append((site, what)))
    with np.errstate(all="ignore"):
        values = _values(program, arguments)
        values.update(_scratch(program, len(arguments), math.prod(sizes), memory))
        state = State(program, threads, shared, memory, values, check)
        memory.report = state.race
        machine = Machine(state, limit)
        places = itertools.product(*(range(size) for size in reversed(sizes)))
        for number, (z, y, x) in enumerate(places):
            machine.run((x, y, z), sizes, number)
    return _summary(machine, state)


def opcodes_not_supported(ptx: str) -> list[str]:
    """Opcodes of the module that `execute` would refuse, by name."""
    program = parse(ptx)
    memory = GlobalMemory([], False, lambda site, what: None)
    values = {name: 0 for _, name, _ in program.parameters}
    with np.errstate(all="ignore"):
        return unsupported(State(program, 128, 1 << 17, memory, values, False))


def _values(program: Program, arguments: Sequence[Tensor | int | float]) -> dict[str, int]:
    """The bits of every parameter."""
    parameters = program.parameters
    if len(arguments) > len(parameters):
        raise WrongInput(
            f"{program.name} takes fewer arguments",
            expected=f"at most {len(parameters)}",
            found=str(len(arguments)),
        )
    values = {name: 0 for _, name, _ in parameters}
    for (kind, name, _), argument in zip(parameters, arguments, strict=False):
        values[name] = _bits(kind, argument)
    return values


def _scratch(program: Program, given: int, programs: int, memory: GlobalMemory) -> dict[str, int]:
    """Global scratch, the first parameter not given, where tensor maps are made in it."""
    maps = sum(one.opcode.startswith("tensormap.cp_") for one in program.instructions)
    if not maps or given >= len(program.parameters):
        return {}
    room = np.zeros(max(4096, 256 * maps) * programs, np.uint8)
    return {program.parameters[given][1]: memory.add(room, True)}


def _bits(kind: str, argument: Tensor | int | float) -> int:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, float):
        wide = kind.endswith("64")
        number = np.float64(argument) if wide else np.float32(argument)
        return int(number.view(np.uint64 if wide else np.uint32))
    return int(argument)


def _summary(machine: Machine, state: State) -> Execution:
    traffic = state.traffic
    return Execution(
        machine.executed,
        state.races,
        tuple(state.race_sites)[:_SITES],
        dict(machine.opcodes()),
        traffic.load_bytes,
        traffic.load_sectors,
        traffic.store_bytes,
        traffic.store_sectors,
        traffic.wavefronts,
        traffic.ideal,
    )
