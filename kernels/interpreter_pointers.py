"""Pointers of the interpreter that know which argument they come from, and are checked.

Every pointer's handle carries the extent of its argument through pointer arithmetic, so that a read
that runs from one argument into another is seen too.
"""

from __future__ import annotations

import importlib
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .interpreter_arithmetic import Replacement
from .interpreter_bounds import Extent, OutOfBounds, extent_of
from .interpreter_numbers import Array

_EXTENT = "planish_extent"
_KEEP_THE_POINTER = (
    "create_addptr",
    "create_splat",
    "create_broadcast",
    "create_expand_dims",
    "create_reshape",
    "create_trans",
    "create_bitcast",
    "ternary_op",
)


class Pointers:
    """Replacements of the interpreter's methods that make, move and use pointers.

    strict: a pointer may reach the elements of its view only, from the first to the last; otherwise
    the whole storage of it.
    """

    def __init__(self, module: Any, strict: bool) -> None:
        self._module, self._strict = module, strict
        self._tl: Any = importlib.import_module("triton.language")
        self._extents: dict[int, Extent] = {}

    def replacements(self) -> list[Replacement]:
        builder, executor = self._module.InterpreterBuilder, self._module.GridExecutor
        return [
            (builder, "create_masked_load", self._load),
            (builder, "create_masked_store", self._store),
            (builder, "create_atomic_rmw", self._atomic),
            (builder, "create_atomic_cas", self._swap),
            *((builder, name, self._keep_extent) for name in _KEEP_THE_POINTER),
            (executor, "_init_args_hst", self._remember),
            (executor, "__call__", self._run),
        ]

    def _keep_extent(self, original: Any, builder: Any, *operands: Any, **named: Any) -> Any:
        made = original(builder, *operands, **named)
        for operand in operands:
            if _EXTENT in getattr(operand, "attr", ()):
                made.attr[_EXTENT] = operand.attr[_EXTENT]
        return made

    def _remember(self, original: Any, executor: Any, given: Any, named: Any) -> Any:
        """Note the extents of a launch's tensors by their first addresses."""
        args, kwargs = original(executor, given, named)
        self._extents.clear()
        for name, value in [*zip(executor.arg_names, args, strict=False), *kwargs.items()]:
            for tensor in value if isinstance(value, tuple) else (value,):
                tensor = getattr(tensor, "base", tensor) if _is_descriptor(tensor) else tensor
                if hasattr(tensor, "data_ptr"):
                    self._note(extent_of(name, tensor, self._strict))
        return args, kwargs

    def _note(self, extent: Extent) -> None:
        """Of views that begin at one address, the one that reaches farthest holds for all."""
        known = self._extents.get(extent.start)
        if known is None or known.high < extent.high:
            self._extents[extent.start] = extent

    def argument(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The conversion of a launch's argument, given the interpreter's."""

        def convert(value: Any) -> Any:
            tl = self._tl
            if isinstance(value, float):  # not the weak type of a number in the source
                handle = self._module.TensorHandle(np.array([value], np.float32), tl.float32)
                return tl.tensor(handle, tl.float32)
            if _is_one(value):  # compiled in as a constant, not as a tensor
                return 1
            made = original(value)
            if hasattr(value, "data_ptr"):
                made.handle.attr[_EXTENT] = self._extents[value.data_ptr()]
            return made

        return convert

    def _check(self, pointers: Any, mask: Any, what: str) -> None:
        addresses = pointers.data
        if mask is not None:
            addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        nbytes = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        program = tuple(self._module.interpreter_builder.grid_idx)
        extent: Extent | None = pointers.attr.get(_EXTENT)
        if extent is not None:
            extent.check(addresses, nbytes, what, program)
            return
        self._check_any(addresses, nbytes, what, program)

    def _check_any(self, addresses: Array, nbytes: int, what: str, program: Any) -> None:
        """A pointer of unknown origin (computed, or loaded) may reach into any argument."""
        inside = np.zeros(addresses.shape, dtype=np.bool_)
        for extent in self._extents.values():
            inside |= (addresses >= extent.low) & (addresses + np.uint64(nbytes) <= extent.high)
        if not inside.all():
            raise OutOfBounds(
                f"{what} leaves every tensor of the launch: "
                f"{int((~inside).sum())} of {addresses.size} active addresses lie outside",
                where=f"program {program}",
            )

    def _load(
        self, original: Any, builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any
    ) -> Any:
        self._check(pointers, mask, "a load")
        return original(builder, pointers, mask, *rest, **named)

    def _store(
        self, original: Any, builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        self._check(pointers, mask, "a store")
        return original(builder, pointers, value, mask, *rest)

    def _atomic(
        self,
        original: Any,
        builder: Any,
        kind: Any,
        pointers: Any,
        value: Any,
        mask: Any,
        *how: Any,
    ) -> Any:
        self._check(pointers, mask, "an atomic operation")
        return original(builder, kind, pointers, value, mask, *how)

    def _swap(self, original: Any, builder: Any, pointers: Any, *rest: Any) -> Any:
        self._check(pointers, None, "an atomic operation")
        return original(builder, pointers, *rest)

    def _run(self, original: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """A launch; OutOfBounds comes out as itself and not as the text of another error."""
        try:
            with np.errstate(all="ignore"):
                return original(executor, *args, **kwargs)
        except self._module.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OutOfBounds):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause.located(_line_of_kernel(cause)) from None


def _line_of_kernel(error: BaseException) -> str:
    """File and line of the innermost code that belongs to neither Triton nor the repair."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_machinery(f.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _is_machinery(file: str) -> bool:
    return f"{os.sep}triton{os.sep}" in file or Path(file).name.startswith("interpreter")


def _is_one(value: Any) -> bool:
    return type(value) is int and value == 1


def _is_descriptor(value: Any) -> bool:
    return hasattr(value, "base") and hasattr(value, "block_shape")
