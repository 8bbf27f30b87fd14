"""Exchange within a warp: shfl, vote, redux, match, elect, activemask (PTX ISA 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, UnsupportedInstruction
from .ptx_parse import Instruction
from .ptx_registers import numpy_type
from .ptx_state import Builder, Handler, Mask, State, known

Array = NDArray[Any]


def _shuffle(state: State, instruction: Instruction, site: int) -> Handler:
    """shfl.sync.mode.b32 d[|p], a, b, c, membermask: p tells whether the source is in range."""
    del site
    (mode,) = known(instruction, "sync", "up", "down", "bfly", "idx") - {"sync"}
    names = [name.strip() for name in instruction.operands[0].split("|")]
    target = state.registers.target(names[0], np.uint32)
    flag = state.registers.target(names[1], np.bool_) if names[1:] else None
    value, amount, clamp = (
        state.registers.source(each, np.uint32) for each in instruction.operands[1:4]
    )
    fixed = not any(each.startswith("%") for each in instruction.operands[2:4])
    ready = _partners(state, mode, amount, clamp) if fixed else None

    def run(mask: Mask) -> None:
        thread, inside = ready or _partners(state, mode, amount, clamp)
        np.copyto(target, value[thread], where=mask)
        if flag is not None:
            np.copyto(flag, inside, where=mask)

    return run


def _partners(state: State, mode: str, amount: Array, clamp: Array) -> tuple[Array, Array]:
    """The thread that each thread reads, and whether it is in range (PTX ISA, shfl.sync)."""
    thread = state.everyone
    lane = thread & 31
    b, c = amount.astype(np.int64) & 31, clamp.astype(np.int64)
    segment = c >> 8 & 31
    last = (lane & segment) | (c & 31 & ~segment)
    first = lane & segment
    if mode == "up":
        source, inside = lane - b, lane - b >= last
    elif mode == "down":
        source, inside = lane + b, lane + b <= last
    elif mode == "bfly":
        source, inside = lane ^ b, (lane ^ b) <= last
    else:
        source = first | (b & ~segment)
        inside = source <= last
    return (thread & ~31) | np.where(inside, source, lane), inside


def _members(state: State, operand: str) -> Callable[[Mask], Array]:
    """A function to the threads that take part [warps, 32]."""
    bits = state.registers.source(operand, np.uint32)
    lane = np.uint32(1) << (state.everyone & 31).astype(np.uint32)

    def members(mask: Mask) -> Array:
        inside = bits & lane != 0
        return (inside if mask is True else inside & mask).reshape(-1, 32)

    return members


def _ballot(truth: Array) -> Array:
    """Bits of the true lanes, the same for every lane of a warp [threads] uint32."""
    words = np.packbits(truth, axis=1, bitorder="little").view("<u4")[:, 0]
    return np.repeat(words, 32)


def _vote(state: State, instruction: Instruction, site: int) -> Handler:
    """vote.sync.{all, any, uni, ballot}."""
    del site
    (mode,) = known(instruction, "sync", "all", "any", "uni", "ballot") - {"sync"}
    name, operand, member = instruction.operands
    flip = operand.startswith("!")
    value = state.registers.source(operand.lstrip("!"), np.bool_)
    target = state.registers.target(name, np.uint32 if mode == "ballot" else np.bool_)
    members = _members(state, member)

    def run(mask: Mask) -> None:
        who = members(mask)
        truth = (~value if flip else value).reshape(-1, 32)
        if mode == "ballot":
            np.copyto(target, _ballot(truth & who), where=mask)
            return
        every, some = (truth | ~who).all(1), (truth & who).any(1)
        result = {"all": every, "any": some, "uni": every | ~some}[mode]
        np.copyto(target, np.repeat(result, 32), where=mask)

    return run


def _active_mask(state: State, instruction: Instruction, site: int) -> Handler:
    del site
    target = state.registers.target(instruction.operands[0], np.uint32)

    def run(mask: Mask) -> None:
        active = np.ones(state.threads, bool) if mask is True else mask
        np.copyto(target, _ballot(active.reshape(-1, 32)), where=mask)

    return run


_REDUCE: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _redux(state: State, instruction: Instruction, site: int) -> Handler:
    """redux.sync.op.type d, a, membermask; of f32 (sm_100): min and max, NaN ignored or passed."""
    del site
    words = known(instruction, "sync", "NaN", "abs", *_REDUCE) - {"sync"}
    (operation,) = words & set(_REDUCE)
    function = _REDUCE[operation]
    dtype = numpy_type(instruction.type)
    neutral: Any = 0
    if operation in ("min", "max"):
        info = np.finfo(dtype) if dtype is np.float32 else np.iinfo(dtype)
        neutral = info.max if operation == "min" else info.min
        if dtype is np.float32:
            neutral = np.inf if operation == "min" else -np.inf
            if "NaN" not in words:
                function = np.fmin if operation == "min" else np.fmax
    elif operation == "and":
        neutral = (
            dtype(0) - dtype(1) if np.issubdtype(dtype, np.signedinteger) else np.iinfo(dtype).max
        )
    name, operand, member = instruction.operands
    target = state.registers.target(name, dtype)
    value = state.registers.source(operand, dtype)
    members = _members(state, member)

    def run(mask: Mask) -> None:
        values = np.abs(value) if "abs" in words else value
        rows = np.where(members(mask), values.reshape(-1, 32), dtype(neutral))
        result = function.reduce(rows, axis=1, dtype=dtype)
        np.copyto(target, np.repeat(result, 32), where=mask)

    return run


def _match(state: State, instruction: Instruction, site: int) -> Handler:
    """match.any.sync and match.all.sync: lanes that hold the same value."""
    del site
    words = known(instruction, "any", "all", "sync")
    names = [name.strip() for name in instruction.operands[0].split("|")]
    target = state.registers.target(names[0], np.uint32)
    flag = state.registers.target(names[1], np.bool_) if names[1:] else None
    value = state.registers.source(instruction.operands[1], numpy_type(instruction.type))
    members = _members(state, instruction.operands[2])
    weights = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def run(mask: Mask) -> None:
        who, rows = members(mask), value.reshape(-1, 32)
        same = (rows[:, :, None] == rows[:, None, :]) & who[:, None, :]
        bits = (same * weights).sum(2, dtype=np.uint32)
        every = (bits == (who * weights).sum(1, dtype=np.uint32)[:, None]) & who
        if "all" in words:
            alike = np.repeat((every | ~who).all(1), 32).reshape(-1, 32)
            bits = np.where(alike, bits, np.uint32(0))
            if flag is not None:
                np.copyto(flag, alike.reshape(-1), where=mask)
        np.copyto(target, bits.reshape(-1), where=mask)

    return run


def _elect(state: State, instruction: Instruction, site: int) -> Handler:
    """elect.sync d|p, membermask: p holds in the lowest lane that takes part."""
    del site
    names = [name.strip() for name in instruction.operands[0].split("|")]
    if len(names) != 2:
        raise Fault(UnsupportedInstruction, "elect.sync without a predicate")
    leader = state.registers.target(names[0], np.uint32)
    flag = state.registers.target(names[1], np.bool_)
    members = _members(state, instruction.operands[1])
    lanes = np.arange(32)

    def run(mask: Mask) -> None:
        first = members(mask).argmax(1)
        np.copyto(leader, np.repeat(first, 32).astype(np.uint32), where=mask)
        np.copyto(flag, (lanes[None] == first[:, None]).reshape(-1), where=mask)

    return run


WARP: Mapping[str, Builder] = {
    "shfl": _shuffle,
    "vote": _vote,
    "activemask": _active_mask,
    "redux": _redux,
    "match": _match,
    "elect": _elect,
}
"""Builders by the first word of the opcode."""
