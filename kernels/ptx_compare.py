"""Comparisons and selections: setp, set, selp, slct, testp (PTX ISA 9.7.6 and 9.7.7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx_errors import Fault, UnsupportedInstruction
from .ptx_float import FLOATS
from .ptx_numbers import from_bf16
from .ptx_parse import Instruction
from .ptx_registers import numpy_type
from .ptx_state import Builder, Handler, Mask, State, assign, known, typed

Array = NDArray[Any]
Compare = Callable[[Array, Array], Array]

_BASE: dict[str, Compare] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOIN: dict[str, Compare] = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def _neither(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def _comparison(word: str, floating: bool) -> Compare:
    """The function of a comparison's word; with u appended, NaN makes it true."""
    if word in _BASE and not (floating and word == "ne"):
        return _BASE[word]
    if not floating:
        return _BASE[_UNSIGNED[word]]
    if word == "num":
        return lambda a, b: ~_neither(a, b)
    if word == "nan":
        return _neither
    if word == "ne":
        return lambda a, b: (a != b) & ~_neither(a, b)
    base = _BASE[word[:-1]]
    return lambda a, b: base(a, b) | _neither(a, b)


def _words(instruction: Instruction) -> tuple[str, Compare | None]:
    """The comparison and how it is joined with a predicate."""
    modifiers = known(
        instruction, *_BASE, *_UNSIGNED, *_JOIN, "num", "nan", *(f"{n}u" for n in _BASE), "ftz",
        *(("f16x2", "u32", "s32", "b32", "f32", "f16", "u16", "bf16", "bf16x2")
          if instruction.words[0] == "set" else ()),
    )  # fmt: skip
    join = next((_JOIN[word] for word in instruction.words if word in _JOIN), None)
    return next(w for w in instruction.words[1:] if w in modifiers and w not in _JOIN), join


def _operands(state: State, instruction: Instruction, kind: str) -> Callable[[], list[Array]]:
    """A function to the two operands as numbers; pairs are [threads, 2]."""
    raw = typed(state, instruction, kind)[:2]
    if kind in ("f16x2", "bf16x2"):
        half = np.float16 if kind == "f16x2" else np.uint16
        raw = [value.view(half).reshape(-1, 2) for value in raw]
    if kind.startswith("bf16"):
        return lambda: [from_bf16(value) for value in raw]
    return lambda: raw


def _set_predicate(state: State, instruction: Instruction, site: int) -> Handler:
    """setp p[|q], a, b[, c]: q gets the negation, or of packed halves the second comparison."""
    del site
    kind = instruction.type
    word, join = _words(instruction)
    numbers = _operands(state, instruction, kind)
    compare = _comparison(word, kind in FLOATS)
    names = instruction.operands[0].split("|")
    targets = [state.registers.target(name.strip(), np.bool_) for name in names]
    guard, flip = None, False
    if join is not None:
        operand = instruction.operands[3]
        guard = state.registers.source(operand.lstrip("!"), np.bool_)
        flip = operand.startswith("!")
    if (
        not targets[1:]
        and guard is None
        and not kind.startswith("bf16")
        and isinstance(compare, np.ufunc)
    ):
        only, (a, b) = targets[0], numbers()
        return lambda mask: compare(a, b, out=only, where=mask)

    def run(mask: Mask) -> None:
        truth = compare(*numbers())
        parts = [truth[:, 0], truth[:, 1]] if truth.ndim == 2 else [truth, ~truth]
        for target, part in zip(targets, parts, strict=False):
            if guard is not None and join is not None:
                part = join(part, ~guard if flip else guard)
            np.copyto(target, part, where=mask)

    return run


def _set(state: State, instruction: Instruction, site: int) -> Handler:
    """set.cmp.dtype.stype: 1.0, or all ones for an integer, where the comparison holds."""
    del site
    to, of = instruction.words[-2:]
    word, join = _words(instruction)
    if join is not None:
        raise Fault(UnsupportedInstruction, "set joined with a predicate")
    numbers = _operands(state, instruction, of)
    compare = _comparison(word, of in FLOATS)
    target = state.registers.target(instruction.operands[0], numpy_type(to))
    ones: dict[str, int] = {"f16": 0x3C00, "bf16": 0x3F80, "f16x2": 0x3C00, "bf16x2": 0x3F80}
    one = ones.get(to, 0x3F800000 if to == "f32" else (1 << 8 * target.itemsize) - 1)
    bits = (
        target.view(np.uint16).reshape(-1, 2)
        if to.endswith("x2")
        else target.view(f"u{target.itemsize}")
    )

    def run(mask: Mask) -> None:
        truth = compare(*numbers())
        where = mask if mask is True or truth.ndim == 1 else mask[:, None]
        np.copyto(bits, np.where(truth, bits.dtype.type(one), bits.dtype.type(0)), where=where)

    return run


def _select(state: State, instruction: Instruction, site: int) -> Handler:
    """selp d, a, b, p."""
    del site
    known(instruction)
    dtype = np.dtype(numpy_type(instruction.type))
    bits = np.dtype(f"u{dtype.itemsize}").type
    name, a, b, p = instruction.operands
    target = state.registers.target(name, bits)
    x, y = (state.registers.source(each, dtype.type).view(bits) for each in (a, b))
    choice = state.registers.source(p, np.bool_)
    return assign(target, lambda: np.where(choice, x, y))


def _select_sign(state: State, instruction: Instruction, site: int) -> Handler:
    """slct d, a, b, c: a where c is not negative."""
    del site
    of = instruction.type
    dtype = numpy_type(instruction.words[-2])
    name, a, b, c = instruction.operands
    target = state.registers.target(name, dtype)
    x, y = (state.registers.source(each, dtype) for each in (a, b))
    sign = state.registers.source(c, numpy_type(of))
    return assign(target, lambda: np.where(sign >= 0, x, y))


_TESTS: dict[str, Callable[[Array], Array]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda x: ~np.isnan(x),
    "notanumber": np.isnan,
    "subnormal": lambda x: (np.abs(x) < np.finfo(x.dtype).tiny) & (x != 0),
    "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
}


def _test(state: State, instruction: Instruction, site: int) -> Handler:
    del site
    (word,) = known(instruction, *_TESTS)
    target = state.registers.target(instruction.operands[0], np.bool_)
    (value,) = typed(state, instruction, instruction.type)
    return assign(target, lambda: _TESTS[word](value))


COMPARE: Mapping[str, Builder] = {
    "setp": _set_predicate,
    "set": _set,
    "selp": _select,
    "slct": _select_sign,
    "testp": _test,
}
"""Builders by the first word of the opcode."""
