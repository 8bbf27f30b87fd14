"""The kernels of this folder: every file that declares SPEC.

A file says by the class of its SPEC what it is for, so that the CPU's kernels are listed without
importing Triton.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import Any

from .spec import KernelSpec
from .triton_spec import TritonSpec


@cache
def kernels() -> dict[str, KernelSpec]:
    """Every kernel outside of Triton by name; a SPEC of another name than its file is refused."""
    return _declared(KernelSpec)


@cache
def triton_kernels() -> dict[str, TritonSpec]:
    """Every Triton kernel by name. Importing them imports triton; raises MissingExtra."""
    from .triton_version import check_triton

    check_triton()
    return _declared(TritonSpec)


def _declared(kind: type[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if _class_of_spec(path) != kind.__name__:
            continue
        spec = importlib.import_module(f".{path.stem}", __package__).SPEC
        assert isinstance(spec, kind), f"SPEC of {path.name} is not a {kind.__name__}"
        assert spec.name == path.stem, f"SPEC of {path.name} calls itself {spec.name}"
        found[spec.name] = spec
    return found


def _class_of_spec(path: Path) -> str | None:
    """The name that is called in `SPEC = Class(...)`, if the file assigns one."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id="SPEC")], value=ast.Call(func=ast.Name(id=name))):
                return name
            case _:
                continue
    return None
