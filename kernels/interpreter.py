"""Triton's interpreter, repaired: it computes as a GPU does and stays inside of its tensors.

Triton 3.9 computes bfloat16 on the bits as if they were integers, cuts float32 to bfloat16 short
and fp8 wrongly, gives float arguments the type of what they meet, takes an argument of 1 for a
tensor, and reads any address.
What stays simplified: bfloat16 sums are rounded once, at the end; tl.dot accumulates in float32 in
numpy's order; programs run one after the other, so races between them are invisible; reductions
with an index skip NaN. tl.max and tl.min ignore NaN, as max.f32 of PTX does.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

from ..ir.errors import PlanishError
from .interpreter_arithmetic import Arithmetic
from .interpreter_bounds import OutOfBounds
from .interpreter_pointers import Pointers
from .triton_version import check_triton

__all__ = ["InterpreterOff", "OutOfBounds", "Repair", "repair"]


class InterpreterOff(PlanishError):
    """The process does not interpret kernels, or began to too late."""


def repair(tf32: bool = False, strict: bool = True) -> Repair:
    """Repair the interpreter of this process, until the end of it or of a `with` block.

    tf32: tl.dot of float32 cuts its operands to tf32 where the kernel does not ask for "ieee".
    strict: a pointer may reach the elements of its view only, from the first to the last; otherwise
    the whole storage of it. Raises MissingExtra, WrongTriton, InterpreterOff.
    """
    check_triton()
    return Repair(_interpreter(), tf32, strict)


def _interpreter() -> Any:
    """Triton's module, whose private classes are patched; Any, as they are nobody's interface."""
    language: Any = importlib.import_module("triton.language")
    module: Any = importlib.import_module("triton.runtime.interpreter")
    knobs: Any = importlib.import_module("triton.knobs")
    if not knobs.runtime.interpret:
        raise InterpreterOff(
            "kernels are not interpreted in this process",
            expected="TRITON_INTERPRET=1 in the environment",
            fix="set it before anything imports triton; such a process cannot compile",
        )
    if not isinstance(language.cdiv, module.InterpretedFunction):
        raise InterpreterOff(
            "triton was imported before TRITON_INTERPRET was set",
            fix="set TRITON_INTERPRET=1 first, in a process of its own",
        )
    return module


class Repair:
    """The repaired state: in force from its making; `close`, or leaving `with`, undoes it."""

    def __init__(self, module: Any, tf32: bool, strict: bool) -> None:
        self._undo = contextlib.ExitStack()
        pointers = Pointers(module, strict)
        for owner, name, new in [
            *Arithmetic(module, tf32).replacements(),
            *pointers.replacements(),
        ]:
            self._set(owner, name, _method(new, getattr(owner, name)))
        self._set(module, "_implicit_cvt", pointers.argument(module._implicit_cvt))

    def close(self) -> None:
        """Undo the repair."""
        self._undo.close()

    def __enter__(self) -> Repair:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)


def _method(replacement: Callable[..., Any], original: Any) -> Callable[..., Any]:
    """A function that a class takes as its method, and that the replacement is called by."""

    def method(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    return method
