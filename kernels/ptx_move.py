"""mov, ld, st and cvta: data between registers and memories (PTX ISA 9.7.9)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, OutOfBounds, UnsupportedInstruction
from .ptx_parse import Instruction
from .ptx_registers import UNSIGNED, elements, numpy_type
from .ptx_state import (
    LOCAL_WINDOW,
    SHARED_WINDOW,
    Builder,
    Handler,
    Mask,
    State,
    addresses,
    assign,
    packed,
    side_by_side,
)

Array = NDArray[Any]
Load = Callable[[Array, Array, int], Array]
Store = Callable[[Array, Array, int, Array], None]

_SPACES = ("global", "shared", "shared::cta", "local", "const", "param")
_HINTS = (
    "volatile", "relaxed", "acquire", "release", "weak", "gpu", "sys", "cta", "cluster", "nc", "ca",
    "cg", "cs", "lu", "cv", "wb", "wt", "v2", "v4", "v8", "L1::evict_last", "L1::evict_first",
    "L1::no_allocate", "L1::evict_normal", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B",
    "L1::evict_unchanged", "L2::evict_first", "L2::evict_last", "L2::evict_normal",
)  # fmt: skip


def _form(instruction: Instruction) -> tuple[str, int, int]:
    """(space, elements, bytes of one) of a load or store."""
    words = instruction.words[1:-1]
    unknown = set(words).difference(_SPACES, _HINTS)
    if unknown:
        raise Fault(UnsupportedInstruction, f"the modifiers {', '.join(sorted(unknown))} are new")
    space = next((word for word in words if word in _SPACES), "generic")
    count = next((int(word[1:]) for word in words if word in ("v2", "v4", "v8")), 1)
    kind = instruction.type
    width = 16 if kind == "b128" else np.dtype(numpy_type(kind)).itemsize
    return space.split("::")[0], count, width


def _load(state: State, instruction: Instruction, site: int) -> Handler:
    """ld to one register or {a, b, ...}."""
    space, count, width = _form(instruction)
    if space == "param":
        return _parameter(state, instruction)
    dtype = numpy_type(instruction.type)
    names = elements(instruction.operands[0])
    targets = [state.registers.target(name, dtype) for name in names]
    now = addresses(state, instruction.operands[1])
    read = _reader(state, space, site)
    nbytes = count * width
    single = len(targets) == 1 and targets[0].dtype == dtype

    def run(mask: Mask) -> None:
        threads = state.active(mask)
        if not len(threads):
            return
        at = now()
        words = read(at if mask is True else at[threads], threads, nbytes)
        values = words.view(dtype)
        if mask is True:
            if single:
                np.copyto(targets[0], values[:, 0])
                return
            for column, target in enumerate(targets):
                target[:] = values[:, column]
            return
        for column, target in enumerate(targets):
            target[threads] = values[:, column]

    return run


def _store(state: State, instruction: Instruction, site: int) -> Handler:
    """st from one register or {a, b, ...}."""
    space, count, width = _form(instruction)
    bits = UNSIGNED[width]
    parts = [state.registers.source(part, bits) for part in elements(instruction.operands[1])]
    now = addresses(state, instruction.operands[0])
    write = _writer(state, space, site)
    nbytes = count * width
    word = UNSIGNED[min(nbytes, 8)]

    def run(mask: Mask) -> None:
        threads = state.active(mask)
        if not len(threads):
            return
        values = side_by_side(parts).view(word)
        if mask is True:
            write(now(), threads, nbytes, values)
        else:
            write(now()[threads], threads, nbytes, values[threads])

    return run


def _reader(state: State, space: str, site: int) -> Load:
    shared, memory, traffic = state.shared, state.memory, state.traffic
    if space == "shared":
        return lambda at, threads, nbytes: shared.load(at, threads, nbytes, site, traffic)
    if space in ("global", "const"):
        return lambda at, threads, nbytes: memory.load(at, threads, nbytes, site, traffic)
    if space == "local":
        return lambda at, threads, nbytes: _local(state, at, threads, nbytes)
    parts = [_reader(state, name, site) for name in ("global", "shared", "local")]

    def read(at: Array, threads: Array, nbytes: int) -> Array:
        which, base = _window(at)
        return parts[which](at - base, threads, nbytes)

    return read


def _writer(state: State, space: str, site: int) -> Store:
    shared, memory, traffic = state.shared, state.memory, state.traffic
    if space == "shared":

        def to_shared(at: Array, threads: Array, nbytes: int, values: Array) -> None:
            shared.store(at, threads, nbytes, values, site, traffic)

        return to_shared
    if space == "global":
        return lambda at, threads, nbytes, values: memory.store(
            at, threads, nbytes, values, site, traffic
        )
    if space == "local":
        return lambda at, threads, nbytes, values: _keep(state, at, threads, nbytes, values)
    parts = [_writer(state, name, site) for name in ("global", "shared", "local")]

    def write(at: Array, threads: Array, nbytes: int, values: Array) -> None:
        which, base = _window(at)
        parts[which](at - base, threads, nbytes, values)

    return write


def _window(address: Array) -> tuple[int, int]:
    """Which space generic addresses belong to, and where it begins."""
    tops = np.unique(address >> 56)
    if len(tops) != 1:
        raise Fault(UnsupportedInstruction, "a generic access to several spaces at once")
    top = int(tops[0])
    return (top, top << 56) if top in (0, 1, 2) else (0, 0)


def _local(state: State, address: Array, threads: Array, nbytes: int) -> Array:
    at = _inside_local(state, address, nbytes)
    return state.local[threads[:, None], at].view(UNSIGNED[min(nbytes, 8)])


def _keep(state: State, address: Array, threads: Array, nbytes: int, values: Array) -> None:
    at = _inside_local(state, address, nbytes)
    state.local[threads[:, None], at] = np.ascontiguousarray(values).view(np.uint8)


def _inside_local(state: State, address: Array, nbytes: int) -> Array:
    size = state.local.shape[1]
    if (address < 0).any() or (address + nbytes > size).any():
        raise Fault(OutOfBounds, f"an address outside the {size} bytes of local memory")
    return address[:, None] + np.arange(nbytes)


def _parameter(state: State, instruction: Instruction) -> Handler:
    """ld.param: the launch's argument, the same for every thread."""
    name, _, offset = instruction.operands[1].strip("[] ").partition("+")
    if int(offset or "0", 0):
        raise Fault(UnsupportedInstruction, "part of a parameter")
    dtype = np.dtype(numpy_type(instruction.type))
    target = state.registers.target(instruction.operands[0], UNSIGNED[dtype.itemsize])
    value = state.values[name.strip()] % (1 << 8 * dtype.itemsize)
    return lambda mask: np.copyto(target, target.dtype.type(value), where=mask)


def _move(state: State, instruction: Instruction, site: int) -> Handler:
    """mov: one register, or packing and unpacking of {a, b, ...}."""
    del site
    name, operand = instruction.operands
    kind = instruction.type
    if kind == "pred":
        target = state.registers.target(name, np.bool_)
        if operand.startswith("!"):
            inverse = state.registers.source(operand[1:], np.bool_)
            return assign(target, lambda: ~inverse)
        value = state.registers.source(operand, np.bool_)
        return lambda mask: np.copyto(target, value, where=mask)
    nbytes = np.dtype(numpy_type(kind)).itemsize
    names = elements(name)
    part = UNSIGNED[nbytes // len(names)]
    if len(names) == 1 and not operand.startswith("{"):
        target = state.registers.target(name, UNSIGNED[nbytes])
        source = state.registers.source(operand, numpy_type(kind)).view(UNSIGNED[nbytes])
        return lambda mask: np.copyto(target, source, where=mask)
    get = packed(state, operand, part, nbytes)
    targets = [state.registers.target(each, part) for each in names]

    def run(mask: Mask) -> None:
        values = get()
        for column, target in enumerate(targets):
            np.copyto(target, values[:, column], where=mask)

    return run


def _generic(state: State, instruction: Instruction, site: int) -> Handler:
    """cvta: between an address of one space and the generic one."""
    del site
    words = instruction.words
    space = next(
        word
        for word in words
        if word.split("::")[0] in ("global", "shared", "local", "param", "const")
    )
    window = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW}.get(space.split("::")[0], 0)
    shift = (
        np.uint64(window) if "to" not in words else np.uint64((1 << 64) - window if window else 0)
    )
    target = state.registers.target(instruction.operands[0], np.uint64)
    source = state.registers.source(instruction.operands[1], np.uint64)
    return assign(target, lambda: source + shift)


MOVE: Mapping[str, Builder] = {
    "ld": _load,
    "st": _store,
    "ldu": _load,
    "mov": _move,
    "cvta": _generic,
}
"""Builders by the first word of the opcode."""
