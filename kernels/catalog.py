"""The kernels of this folder: every file that declares SPEC."""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path

from .spec import KernelSpec


@cache
def kernels() -> dict[str, KernelSpec]:
    """Every kernel by name; a file whose SPEC has another name than the file is refused."""
    found: dict[str, KernelSpec] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not _declares_spec(path):
            continue
        spec = importlib.import_module(f".{path.stem}", __package__).SPEC
        assert isinstance(spec, KernelSpec), f"SPEC of {path.name} is not a KernelSpec"
        assert spec.name == path.stem, f"SPEC of {path.name} calls itself {spec.name}"
        found[spec.name] = spec
    return found


def _declares_spec(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    return any(isinstance(target, ast.Name) and target.id == "SPEC" for target in targets)
