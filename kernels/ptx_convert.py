"""cvt: between integers, floats, packed halves and fp8 (PTX ISA 9.7.9 "cvt", "cvt.pack")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, UnsupportedInstruction
from .ptx_numbers import SMALL_FLOATS, from_bf16, to_bf16, to_odd
from .ptx_parse import Instruction
from .ptx_registers import numpy_type
from .ptx_state import Handler, State, assign, known, packed

Array = NDArray[Any]

_INTEGRAL: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}
_MODIFIERS = ("rn", "rna", "rz", "ftz", "sat", "satfinite", "relu", *_INTEGRAL)


def convert(state: State, instruction: Instruction, site: int) -> Handler:
    """Builder of every cvt."""
    del site
    to, of = instruction.words[-2:]
    modifiers = known(instruction, *_MODIFIERS, to)
    small = next((name for name in (to, of) if name.removesuffix("x2") in SMALL_FLOATS), None)
    if small is not None:
        return _small(state, instruction, to, of, modifiers)
    if to in ("f16x2", "bf16x2"):
        return _pair(state, instruction, to, of, modifiers)
    target = state.registers.target(
        instruction.operands[0], numpy_type("b32" if to == "tf32" else to)
    )
    source = state.registers.source(instruction.operands[1], numpy_type(of))
    change = _scalar(to, of, modifiers)
    return assign(target, lambda: change(source))


def _scalar(to: str, of: str, modifiers: set[str]) -> Callable[[Array], Array]:
    integer = to[0] in "usb" and to[1].isdigit()
    rounding = next((_INTEGRAL[name] for name in modifiers if name in _INTEGRAL), None)
    if "rz" in modifiers and to != "f32":
        raise Fault(UnsupportedInstruction, f"cvt.rz to {to}")

    def change(value: Array) -> Array:
        if of == "bf16":
            value = from_bf16(value)
        if rounding is not None and value.dtype.kind == "f":
            value = rounding(value)
        if integer:
            return _to_integer(value, np.dtype(numpy_type(to)), "sat" in modifiers)
        if to == "tf32":
            return _to_tf32(value, "rna" in modifiers)
        if "rz" in modifiers:
            return _toward_zero(value)
        result = _to_float(value, to)
        return result if not modifiers & {"sat", "relu"} else _limited(result, to, modifiers)

    return change


def _to_integer(value: Array, dtype: np.dtype[Any], saturate: bool) -> Array:
    """Floats saturate and NaN becomes 0; integers wrap unless .sat is given."""
    limits = np.iinfo(dtype)
    if value.dtype.kind == "f":
        wide = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=1e300, neginf=-1e300)
        high, low = wide >= float(limits.max), wide <= float(limits.min)
        inside = np.where(high | low, 0, wide).astype(dtype)
        return np.where(high, dtype.type(limits.max), np.where(low, dtype.type(limits.min), inside))
    if saturate:
        wide = value.astype(object) if value.dtype == np.uint64 else value.astype(np.int64)
        return np.clip(wide, limits.min, limits.max).astype(dtype)
    return value.astype(dtype)


def _to_float(value: Array, to: str) -> Array:
    """To nearest even, in one rounding, as raw bits where numpy lacks the type."""
    if to != "bf16":
        if value.dtype.kind in "iu" and to == "f16":
            value = value.astype(np.float64)
        return value.astype(numpy_type(to))
    if value.dtype.kind in "iu":
        value = to_odd(value.astype(np.longdouble), np.float64)
    return to_bf16(to_odd(value) if value.dtype == np.float64 else value.astype(np.float32))


def _limited(result: Array, to: str, modifiers: set[str]) -> Array:
    if to == "bf16":
        return to_bf16(_limited(from_bf16(result), "f32", modifiers))
    result = np.where(np.isnan(result) & ("sat" in modifiers), 0, np.maximum(result, 0))
    return np.minimum(result, 1) if "sat" in modifiers else result


def _to_tf32(value: Array, away: bool) -> Array:
    """19 bits of float32: ties away from zero (.rna) or to even (.rn)."""
    bits = value.view(np.uint32)
    half = (
        np.uint32(0x1000) if away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    )
    return np.where(np.isfinite(value), (bits + half) & np.uint32(0xFFFFE000), bits)


def _toward_zero(value: Array) -> Array:
    near = value.astype(np.float32)
    wide = value.astype(np.float64)
    return np.where(
        np.abs(near.astype(np.float64)) > np.abs(wide), np.nextafter(near, np.float32(0)), near
    )


def _cut(value: Array, kind: str) -> Array:
    """float32 rounded toward zero to the precision of a half, as float32."""
    if kind == "bf16":
        return (value.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    near = value.astype(np.float16)
    over = np.abs(near.astype(np.float32)) > np.abs(value)
    return np.where(over, np.nextafter(near, np.float16(0)), near).astype(np.float32)


def _pair(state: State, instruction: Instruction, to: str, of: str, modifiers: set[str]) -> Handler:
    """cvt.rn.f16x2.f32 d, high, low: two floats to the halves of a word."""
    if of != "f32" or modifiers & {"sat", "satfinite"} or len(instruction.operands) != 3:
        raise Fault(UnsupportedInstruction, f"{instruction.opcode} is new")
    kind = to.removesuffix("x2")
    target = state.registers.target(instruction.operands[0], np.uint32)
    half = np.float16 if kind == "f16" else np.uint16
    halves = target.view(half).reshape(-1, 2)
    high, low = (state.registers.source(each, np.float32) for each in instruction.operands[1:])

    def compute() -> Array:
        values = np.stack([low, high], 1)
        if "relu" in modifiers:
            values = np.maximum(values, np.float32(0))
        if "rz" in modifiers:
            values = _cut(values, kind)
        return to_bf16(values) if kind == "bf16" else values

    def run(mask: Any) -> None:
        where = mask if mask is True else mask[:, None]
        np.copyto(halves, compute(), where=where, casting="unsafe")

    return run


def _small(
    state: State, instruction: Instruction, to: str, of: str, modifiers: set[str]
) -> Handler:
    """cvt between pairs of fp8 or fp4 and pairs of float32, float16 or bfloat16."""
    name, *sources = instruction.operands
    if of.removesuffix("x2") in SMALL_FLOATS:
        return _widen_small(state, instruction, to, SMALL_FLOATS[of.removesuffix("x2")])
    form = SMALL_FLOATS[to.removesuffix("x2")]
    if "satfinite" not in modifiers or not to.endswith("x2"):
        raise Fault(UnsupportedInstruction, f"{instruction.opcode} is new")
    if of == "f32":
        high, low = (state.registers.source(each, np.float32) for each in sources)
        get = lambda: np.stack([low, high], 1)  # noqa: E731
    else:
        get = _halves(state, sources[0], of)
    nibbles = form.bits == 4
    target = state.registers.target(name, np.uint8 if nibbles else np.uint16)

    def compute() -> Array:
        values = get()
        if "relu" in modifiers:
            values = np.maximum(values, np.float32(0))
        codes = form.narrow(values)
        if nibbles:
            return codes[:, 0] | codes[:, 1] << 4
        return np.ascontiguousarray(codes).view(np.uint16)[:, 0]

    return assign(target, compute)


def _halves(state: State, operand: str, kind: str) -> Callable[[], Array]:
    if kind == "f16x2":
        get = packed(state, operand, np.float16, 4)
        return lambda: get().astype(np.float32)
    if kind == "bf16x2":
        get = packed(state, operand, np.uint16, 4)
        return lambda: from_bf16(get())
    raise Fault(UnsupportedInstruction, f"a small float of {kind}")


def _widen_small(state: State, instruction: Instruction, to: str, form: Any) -> Handler:
    if to not in ("f16x2", "bf16x2"):
        raise Fault(UnsupportedInstruction, f"{instruction.opcode} is new")
    name, operand = instruction.operands
    target = state.registers.target(name, np.uint32)
    if form.bits == 4:
        byte = state.registers.source(operand, np.uint8)
        codes = lambda: np.stack([byte & 15, byte >> 4], 1)  # noqa: E731
    else:
        codes = packed(state, operand, np.uint8, 2)

    def compute() -> Array:
        wide = form.widen(codes())
        half = wide.astype(np.float16) if to == "f16x2" else to_bf16(wide)
        return np.ascontiguousarray(half).view(np.uint32)[:, 0]

    return assign(target, compute)
