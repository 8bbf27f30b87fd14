"""atom and red: read-modify-write of global and shared memory, lane after lane (PTX ISA 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, UnsupportedInstruction
from .ptx_numbers import from_bf16, to_bf16
from .ptx_parse import Instruction
from .ptx_registers import UNSIGNED, elements, numpy_type
from .ptx_shared import ATOMIC
from .ptx_state import Builder, Handler, Mask, State, addresses

Array = NDArray[Any]
Change = Callable[[Any, Any, Any], Any]

_SCOPES = (
    "sync", "global", "shared", "shared::cta", "gpu", "sys", "cta", "cluster", "relaxed", "acquire",
    "release", "acq_rel", "noftz", "v2", "v4", "v8", "L2::cache_hint",
)  # fmt: skip

_OPERATIONS: dict[str, Change] = {
    "add": lambda old, a, b: old + a,
    "min": lambda old, a, b: np.minimum(old, a),
    "max": lambda old, a, b: np.maximum(old, a),
    "and": lambda old, a, b: old & a,
    "or": lambda old, a, b: old | a,
    "xor": lambda old, a, b: old ^ a,
    "exch": lambda old, a, b: a,
    "cas": lambda old, a, b: np.where(old == a, b, old),
    "inc": lambda old, a, b: np.where(old >= a, 0, old + 1),
    "dec": lambda old, a, b: np.where((old == 0) | (old > a), a, old - 1),
}


def _atomic(state: State, instruction: Instruction, site: int) -> Handler:
    """atom d, [a], b[, c] and red [a], b; vectors of 2, 4 or 8 are element after element."""
    words = instruction.words[1:-1]
    operations = [word for word in words if word in _OPERATIONS]
    unknown = set(words).difference(_SCOPES, _OPERATIONS)
    if unknown or len(operations) != 1:
        raise Fault(UnsupportedInstruction, f"the modifiers {' '.join(words)} are new")
    kind = instruction.type
    dtype = np.dtype(numpy_type(kind))
    reads = instruction.words[0] == "atom"
    goal, address, *values = instruction.operands if reads else ("_", *instruction.operands)
    bits = UNSIGNED[dtype.itemsize]
    goals = [state.registers.target(name, bits) for name in elements(goal)]
    first = state.registers.sources(values[0], bits)
    second = state.registers.sources(values[1], bits) if values[1:] else first
    if not reads:
        goals = [np.zeros(state.threads, bits) for _ in first]
    shared = any(word.startswith("shared") for word in words)
    change = _change(operations[0], kind)
    now = addresses(state, address)
    touch = _shared_words if shared else _global_words

    def run(mask: Mask) -> None:
        threads = state.active(mask)
        if not len(threads):
            return
        at = now()[threads]
        for part in range(len(first)):
            words_of = touch(state, at + part * dtype.itemsize, threads, dtype.itemsize, site)
            for (view, index), thread in zip(words_of, threads, strict=True):
                old = view[index]
                goals[part][thread] = old
                view[index] = change(old, first[part][thread], second[part][thread])

    return run


def _change(operation: str, kind: str) -> Change:
    """The operation on raw bits of the type."""
    function = _OPERATIONS[operation]
    if kind in ("f16x2", "bf16x2", "bf16", "f16"):
        return _on_halves(function, kind)
    dtype = np.dtype(numpy_type(kind))
    bits = np.dtype(UNSIGNED[dtype.itemsize])
    if operation in ("exch", "cas") or dtype == bits:
        return lambda old, a, b: np.asarray(function(old, a, b)).astype(bits)

    def change(old: Any, a: Any, b: Any) -> Any:
        old, a, b = (np.asarray(value, bits).view(dtype) for value in (old, a, b))
        return np.asarray(function(old, a, b)).astype(dtype).view(bits)

    return change


def _on_halves(function: Change, kind: str) -> Change:
    bits = np.dtype(numpy_type(kind if kind != "f16" else "b16"))

    def numbers(value: Any) -> Array:
        raw = np.asarray([value], bits).view(np.uint16)
        return from_bf16(raw) if kind.startswith("bf16") else raw.view(np.float16)

    def change(old: Any, a: Any, b: Any) -> Any:
        result = function(numbers(old), numbers(a), numbers(b))
        raw = to_bf16(result) if kind.startswith("bf16") else result.astype(np.float16)
        return np.ascontiguousarray(raw).view(bits)[0]

    return change


def _global_words(
    state: State, at: Array, threads: Array, nbytes: int, site: int
) -> list[tuple[Array, Any]]:
    return state.memory.atomic(at, threads, nbytes, site)


def _shared_words(
    state: State, at: Array, threads: Array, nbytes: int, site: int
) -> list[tuple[Array, Any]]:
    shared = state.shared
    index, unit = shared.index(at, threads, nbytes)
    state.traffic.count_shared(at, threads, nbytes)
    if shared.check:
        shared.landed(index, unit)
        shared.not_held(index, unit, threads)
        shared.note(ATOMIC, site, unit, index, threads)
    return [(shared.data[unit], (int(each),)) for each in index[:, 0]]


ATOMICS: Mapping[str, Builder] = {"atom": _atomic, "red": _atomic}
"""Builders by the first word of the opcode."""
