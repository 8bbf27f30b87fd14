"""From an instruction to its handler: which table of which family knows it."""

from __future__ import annotations

from collections.abc import Mapping

from .ptx_atomic import ATOMICS
from .ptx_bits import BITS
from .ptx_bulk import bulk
from .ptx_carry import carries, carry
from .ptx_compare import COMPARE
from .ptx_convert import convert
from .ptx_copy import copy_async
from .ptx_errors import Fault, UnsupportedInstruction
from .ptx_float import FLOAT, FLOATS, is_mixed, mixed
from .ptx_integer import INTEGER
from .ptx_mbarrier import MBARRIER
from .ptx_move import MOVE
from .ptx_parse import Instruction
from .ptx_state import Builder, Handler, State
from .ptx_tcgen05 import TCGEN05
from .ptx_tensor_core import TENSOR_CORE
from .ptx_tensormap import TENSORMAP, acquire
from .ptx_warp import WARP
from .ptx_warpgroup import WARPGROUP, accumulators, guarded, register_operands

_TABLES: tuple[Mapping[str, Builder], ...] = (
    MOVE,
    INTEGER,
    BITS,
    COMPARE,
    WARP,
    TENSOR_CORE,
    WARPGROUP,
    ATOMICS,
    MBARRIER,
    TENSORMAP,
    TCGEN05,
)
_FLOW = ("bra", "ret", "exit", "bar", "barrier")
_ORDER = ("membar", "fence", "griddepcontrol", "nanosleep", "prefetch", "prefetchu", "setmaxnreg")


def handler(state: State, instruction: Instruction, site: int) -> Handler:
    """The instruction bound to the state; a Fault where nothing knows it or can read it."""
    build = _builder(instruction)
    if build is None:
        raise Fault(UnsupportedInstruction, f"the simulator does not know {instruction.opcode}")
    try:
        return build(state, instruction, site)
    except (KeyError, ValueError, StopIteration, IndexError, TypeError) as error:
        what = f"the simulator cannot read {instruction.opcode}: {error!r}"
        raise Fault(UnsupportedInstruction, what) from error


def handlers(state: State) -> list[Handler | None]:
    """All instructions of the program; None for branches, returns and barriers of the block."""
    instructions = state.program.instructions
    owned = set[str]()
    for instruction in instructions:
        if instruction.opcode.startswith("wgmma.mma_async"):
            owned |= {*accumulators(instruction), *register_operands(instruction)}
            state.registers.rows(accumulators(instruction))
    found = list[Handler | None]()
    for site, instruction in enumerate(instructions):
        if flows(instruction):
            found.append(None)
            continue
        try:
            action = handler(state, instruction, site)
        except Fault as fault:
            raise fault.at(instruction.place) from None
        if owned and state.check and instruction.words[0] != "wgmma":
            action = guarded(state, instruction, action, owned)
        found.append(action)
    return found


def flows(instruction: Instruction) -> bool:
    """Whether the machine itself executes it: branches, returns, barriers of the block."""
    return instruction.words[0] in _FLOW and not instruction.opcode.startswith("bar.warp")


def unsupported(state: State) -> list[str]:
    """Opcodes of the program that have no handler, in order of appearance."""
    found = dict[str, None]()
    for site, instruction in enumerate(state.program.instructions):
        if not flows(instruction):
            try:
                handler(state, instruction, site)
            except Fault:
                found[instruction.opcode] = None
    return list(found)


def _builder(instruction: Instruction) -> Builder | None:
    word = instruction.words[0]
    if carries(instruction):
        return carry
    if word in ("add", "sub", "fma") and is_mixed(instruction):
        return mixed
    if word in FLOAT and instruction.type in FLOATS:
        return FLOAT[word]
    if word == "cvt":
        return convert
    if instruction.opcode.startswith("cp.async"):
        return bulk if "bulk" in instruction.words else copy_async
    if instruction.opcode.startswith("fence.proxy.tensormap"):
        return acquire
    if word in _ORDER or instruction.opcode.startswith("bar.warp.sync"):
        return _order
    return next((table[word] for table in _TABLES if word in table), None)


def _order(state: State, instruction: Instruction, site: int) -> Handler:
    """Orders memory, which this machine does anyway; fences matter between programs."""
    del site
    if instruction.opcode.startswith("fence.proxy.async"):
        return lambda mask: state.shared.fence_proxy()
    if instruction.words[0] in ("membar", "fence") and "proxy" not in instruction.opcode:
        return lambda mask: state.memory.synchronise()
    return lambda mask: None
