"""Which kernels to verify: one that planish ships, by name, all of them, or a file of anybody's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..ir.errors import PlanishError, UnknownName
from .catalog import triton_kernels
from .triton_spec import TritonSpec
from .triton_version import check_triton


class UnknownKernel(UnknownName):
    kind = "kernel"


class NotAKernelFile(PlanishError):
    """A file that does not declare a Triton kernel."""


def find_kernels(named: str) -> list[TritonSpec]:
    """The kernels meant by a name, "all", or the path of a python file that declares SPEC.

    A file is loaded as a module of its own, and so runs. Raises UnknownKernel, NotAKernelFile,
    MissingExtra, WrongTriton.
    """
    check_triton()
    if named.endswith(".py") or "/" in named:
        return [_from_file(Path(named))]
    shipped = triton_kernels()
    if named == "all":
        return list(shipped.values())
    if named not in shipped:
        raise UnknownKernel(
            f"unknown kernel {named!r}",
            expected="the name of a shipped kernel, all, or a python file that declares SPEC",
            fix=UnknownKernel.named(named, shipped).fix,
        )
    return [shipped[named]]


def _from_file(path: Path) -> TritonSpec:
    if not path.is_file():
        raise NotAKernelFile(
            f"there is no file {path}", fix="name a python file that declares SPEC"
        )
    found = getattr(_load(path), "SPEC", None)
    if not isinstance(found, TritonSpec):
        raise NotAKernelFile(
            f"{path} declares no kernel",
            expected="SPEC = TritonSpec(...) at its top level",
            found="no SPEC" if found is None else f"a SPEC of type {type(found).__name__}",
            fix="see planish.kernels.triton_spec, and examples/verify_a_kernel.py",
        )
    return found


def _load(path: Path) -> Any:
    """The module of a file, which may import files beside it.

    It stays in sys.modules: Triton reads a kernel's source through it.
    """
    name = f"planish_verified_{path.stem}"
    made = importlib.util.spec_from_file_location(name, path.resolve())
    if made is None or made.loader is None:
        raise NotAKernelFile(f"{path} is not a python file")
    module = importlib.util.module_from_spec(made)
    sys.modules[name] = module
    sys.path.append(str(path.resolve().parent))
    try:
        made.loader.exec_module(module)
    except PlanishError:
        raise
    except Exception as error:  # it is somebody's code and may raise anything
        raise NotAKernelFile(
            f"{path} cannot be imported",
            found=f"{type(error).__name__}: {error}",
            fix=f"python {path} must run without an error",
        ) from error
    return module
