"""Steps of a program run one after the other in C, by one team of threads: see plan_cpu.c.

A step is a kind, the addresses of its operands and its sizes. Operands hold one row of floats for
every token; strides are counted in floats, so the same steps serve any number of tokens.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from . import native

SOURCE = "plan_cpu.c"
KEY_BLOCK = 32
"""A cache's capacity is a multiple of this."""
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "sigmoid")


class Kind(IntEnum):
    """What a step computes; the order is that of the C file."""

    LINEAR = 0
    DENSE = 1
    RMS_NORM = 2
    LAYER_NORM = 3
    ROTARY = 4
    POINTWISE = 5
    APPEND_KEY = 6
    APPEND_VALUE = 7
    ATTENTION = 8


class Pointwise(IntEnum):
    """What a POINTWISE step computes; activations follow from 4 on, in their order."""

    ADD = 0
    SUBTRACT = 1
    MULTIPLY = 2
    COPY = 3
    FIRST_ACTIVATION = 4


class StepRecord(ctypes.Structure):
    """`Step` of the C file."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        ("inputs", ctypes.c_void_p * 6),
        ("out", ctypes.c_void_p),
        ("size", ctypes.c_int64 * 16),
        ("number", ctypes.c_double * 2),
    )


class CallRecord(ctypes.Structure):
    """`Call` of the C file."""

    _fields_ = (
        ("first", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("past", ctypes.c_int64),
        ("capacity", ctypes.c_int64),
        ("all", ctypes.c_int64),
        ("caches", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("depth", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Strides:
    """An operand [tokens, heads, width]: floats between tokens and between heads."""

    token: int
    head: int = 0


def record(
    kind: Kind,
    inputs: Sequence[int | None],
    out: int,
    size: Sequence[int],
    number: Sequence[float] = (),
) -> StepRecord:
    """A step from addresses, sizes and numbers."""
    return StepRecord(
        kind,
        (ctypes.c_void_p * 6)(*inputs),
        out,
        (ctypes.c_int64 * 16)(*size),
        (ctypes.c_double * 2)(*number),
    )


def extent(heads: int, width: int, operands: Sequence[Strides | None], out: Strides) -> list[int]:
    """Sizes of a step on [tokens, heads, width] with up to three operands."""
    filled = [*operands, *[None] * (3 - len(operands)), out]
    tokens = [0 if strides is None else strides.token for strides in filled]
    return [heads, width, *tokens, *(0 if s is None else s.head for s in filled)]


def why_not() -> str | None:
    """Why plans cannot run on this machine; None if they can."""
    built = native.library(SOURCE)
    return built if isinstance(built, str) else None


_found: list[ctypes._NamedFuncPointer] = []


def run_steps(
    steps: ctypes.Array[StepRecord], count: int, call: CallRecord, threads: int, first: int = 0
) -> None:
    """Run `count` steps from the step `first` on."""
    if not _found:
        built = native.library(SOURCE)
        assert isinstance(built, ctypes.CDLL), built
        function = built.planish_run_steps
        function.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_int64,
        ]
        _found.append(function)
    begin = ctypes.addressof(steps) + first * ctypes.sizeof(StepRecord)
    if _found[0](begin, count, ctypes.addressof(call), threads):
        raise MemoryError(f"no memory for {call.tokens} tokens")
